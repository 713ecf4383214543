"""The masked autoencoder of images on ImageNet-1k (He et al. 2022; Scenic av_mae imagenet_pretrain).

    python -m avmae_jax.train --config=configs/pretrain/imagenet.py:size=L --config.data.path=DIR --workdir=...

Arguments: size=Ti|S|B|L|H|g.
"""

import ml_collections

from configs import sections


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(arguments, size='L')
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 4096
    config.num_epochs = 800.0
    config.data = sections.data()
    config.image = dict(short_side=256, crop_size=224, crop='resized', eval_crop='central')
    config.preprocess = sections.preprocess()
    config.model = sections.model(
        args.size, modalities=('image',), encoder='shared', decoder='shared', decoder_size='mae'
    )
    config.model.tokenizers.image.update(positions='sincos_2d', class_token=True)
    config.model.decoder.positions = 'sincos_2d'
    config.objective = sections.objective('reconstruction', mask_ratio={'image': 0.75}, standardise='patch')
    config.optimizer = sections.adam(1.5e-4, warmup_epochs=40.0)
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=3000)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=6000, split='validation')
    return config
