"""Finetuning on Kinetics-Sounds (the classes of Kinetics-400 that can be heard, Arandjelovic & Zisserman 2017).

    python -m avmae_jax.train --config=configs/finetune/kinetics_sounds.py --config.data.path=DIR \
        --config.start.path=PRETRAINED --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

The recipe is that of VGGSound at the size of MBT-B (Nagrani et al. 2021 report on this dataset). Its clips are listed
by a CSV of your own (path, label, split).

Arguments: those of configs/finetune/vggsound.py, with size=B.
"""

import ml_collections

from configs.finetune import vggsound


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    config = vggsound.get_config(','.join(filter(None, ('size=B', arguments))))
    config.evaluation.every_steps = 1000
    return config
