"""Pretraining on the sounds of ESC-10, 400 clips of 5 s: what a small encoder learns of them in minutes on a CPU.

    python -m avmae_jax.prepare --input=esc10.csv --media_dir=audio --output=esc10_shards
    python -m avmae_jax.train --config=configs/esc10.py --config.data.path=esc10_shards --workdir=RUN \
        --config.data.split=fold1+fold2+fold3+fold4

`benchmarks/results_esc10.py` does so for every fold; see docs/results.md.
"""

import ml_collections

from configs import sections

SECONDS = 5.0
SIZE = dict(width=96, num_heads=4, mlp_width=384, num_layers=4)


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    sections.parse_arguments(arguments)  # It has none.
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 200.0
    config.data = sections.data(split='fold1+fold2+fold3+fold4')
    config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS, flip=False)
    config.preprocess.time_shift = True  # Three hundred clips are few; where a sound begins says nothing of it.
    config.model = sections.model(
        dict(SIZE), modalities=('audio',), encoder='shared', decoder='shared', decoder_size=dict(SIZE, num_layers=2)
    )
    config.model.tokenizers.audio.update(patch=(20, 32), positions='sincos_2d')
    config.model.compute.dtype = 'float32'  # A CPU has no bfloat16 units.
    config.model.compute.scan = False  # Four layers written out are faster there than a loop.
    config.objective = sections.objective('reconstruction', mask_ratio={'audio': 0.75})
    config.optimizer = sections.adam(1.6e-2, warmup_epochs=6.0)
    config.parallel = sections.parallel()
    config.checkpoint = sections.checkpoint(every_steps=500)
    config.report = sections.report(log_every_steps=100, pictures_every_steps=0)
    config.evaluation = sections.evaluation(every_steps=0)
    return config
