"""Finetuning the image MAE on ImageNet-1k (He et al. 2022, table 9; Scenic av_mae imagenet finetune).

    python -m avmae_jax.train --config=configs/finetune/imagenet.py:size=L --config.data.path=DIR \
        --config.start.path=PRETRAINED --workdir=RUN

The recipe's RandAugment (9, 0.5) and random erasing are done on the device, within the step.

Arguments: size=Ti|S|B|L|H|g, mixup=mixup|none, probe=none|linear.
"""

import ml_collections

from configs import sections

DROP_PATH = {'L': 0.2, 'H': 0.3}  # Of H: He et al., table 9.


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(arguments, size='L', mixup='mixup', probe='none')
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    config.num_epochs = 50.0
    config.data = sections.data()
    config.image = dict(short_side=256, crop_size=224, crop='resized', eval_crop='central')
    config.preprocess = sections.preprocess()
    config.preprocess.rand_augment = dict(num_ops=2, magnitude=9.0, magnitude_std=0.5, op_ratio=0.5)
    config.preprocess.random_erasing = dict(ratio=0.25, area=(0.02, 1 / 3))
    config.model = sections.classifier(
        args.size, modalities=('image',), encoder='shared', drop_path=DROP_PATH.get(args.size, 0.1)
    )
    config.model.tokenizers.image.update(positions='sincos_2d', class_token=True)
    config.model.pooling = 'token'
    cutmix = 1.0 if args.mixup == 'mixup' else None
    config.objective = sections.classification(
        {'label': 'softmax'}, label_smoothing=0.1, mixup=args.mixup, alpha=0.8, cutmix=cutmix
    )
    config.optimizer = sections.adamw(1e-3, warmup_epochs=5.0)
    config.optimizer.end_ratio = 0.00025  # 1e-6 of 4e-3, the rate at a batch of 1024.
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=1250)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=2500, split='validation')
    return config
