"""Finetuning on the sounds of ESC-50, or of its part ESC-10: 2,000 or 400 clips of 5 s in five official folds.

    python -m avmae_jax.prepare --input=ESC-50-master/meta/esc50.csv --media_dir=ESC-50-master/audio --output=esc50
    python -m avmae_jax.crossvalidate --config=configs/finetune/esc50.py --config.data.path=esc50 --workdir=RUN \
        --config.start.path=PRETRAINED

60 epochs in batches of 64 by AdamW with layer decay 0.75 follow AudioMAE (Huang et al. 2022) on ESC-50; what is changed
in the sound is as in the recipe for VGGSound, but for the shift in time.

Arguments: size=Ti|S|B|L|H|g, mixup=mixup|none, probe=none|linear.
"""

import ml_collections

from configs import sections

SECONDS = 5.0


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(arguments, size='B', mixup='mixup', probe='none')
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 60.0
    config.data = sections.data(split='fold1+fold2+fold3+fold4')
    config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS)
    masks = dict(frequency_masks=1, frequency_width=48, time_masks=4, time_width=48)
    sections.augment(config, ('audio',), spec_augment=masks, time_shift=True)
    config.model = sections.classifier(args.size, modalities=('audio',), encoder='shared', drop_path=0.1)
    config.objective = sections.classification({'label': 'softmax'}, label_smoothing=0.1, mixup=args.mixup)
    config.optimizer = sections.adamw(1e-3, warmup_epochs=4.0)
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.parallel = sections.parallel()
    config.checkpoint = sections.checkpoint(every_steps=500)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=250, split='fold5')
    return config
