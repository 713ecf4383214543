"""Finetuning on the sounds of ESC-10 from what `configs/esc10.py` pretrained, or from scratch, in minutes on a CPU.

    python -m avmae_jax.crossvalidate --config=configs/finetune/esc10.py --config.data.path=esc10_shards --workdir=RUN \
        --config.start.path=PRETRAINED/{fold}

Arguments: probe=none|linear, mixup=mixup|none.
"""

import ml_collections

from configs import esc10, sections


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(arguments, probe='none', mixup='mixup')
    # Data and tokens are those of pretraining.
    config = esc10.get_config()
    pretrained = config.model
    config.num_epochs = 40.0
    masks = dict(frequency_masks=1, frequency_width=24, time_masks=2, time_width=48)
    sections.augment(config, ('audio',), spec_augment=masks, time_shift=True)
    config.model = sections.classifier(dict(esc10.SIZE), modalities=('audio',), encoder='shared', drop_path=0.1)
    config.model.tokenizers = pretrained.tokenizers
    config.model.compute = pretrained.compute
    config.objective = sections.classification({'label': 'softmax'}, label_smoothing=0.1, mixup=args.mixup)
    config.optimizer = sections.adamw(2.4e-2, warmup_epochs=4.0)  # 3e-3 at a batch of 32.
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    return config
