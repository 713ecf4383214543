"""Finetuning on AudioSet, the recipe of AV-MAE (Georgescu et al. 2023; Scenic av_mae audioset finetune).

    python -m avmae_jax.train --config=configs/finetune/audioset.py:size=L --config.data.path=DIR \
        --config.start.path=PRETRAINED --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

Clips are drawn by the inverse frequency of their classes; for a training set that is balanced already, such as the
508,994 clips of the paper, give --config.data.balanced_by="".

Arguments: size=Ti|S|B|L|H|g, modalities=video+audio|video|audio|image+audio (one frame of a clip),
encoder=mbt|mid|early|separate|shared, fusion=bottleneck|concatenation|late, fusion_layer=N,
mixup=mixmod|mixup|none, probe=none|linear, records=prepared|legacy (SequenceExamples of the reference).
"""

import ml_collections

from configs import sections

SECONDS = 10.0
FUSION_LAYER = {'L': 18, 'H': 24}  # Of MBT; others: two thirds up.


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments,
        size='L',
        modalities='video+audio',
        encoder='mbt',
        fusion='bottleneck',
        fusion_layer='',
        mixup='mixmod',
        probe='none',
        records='prepared',
    )
    modalities = sections.parse_modalities(args.modalities, ('video', 'audio', 'image'))
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_epochs = 50.0
    config.data = sections.data(records=args.records)
    config.data.balanced_by = 'label'
    if 'video' in modalities:
        config.video = sections.video(num_frames=32, frame_seconds=0.08)
    if 'image' in modalities:
        config.image = dict(short_side=256, crop_size=224, crop='random', eval_crop='central')
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None, records=args.records)
    if 'audio' in modalities and args.records == 'legacy':
        # Of the reference's own log-mels, over AudioSet. Those of ours `prepare` measures, as pretraining takes them.
        config.preprocess.update(audio_mean=1.102, audio_std=2.762)
    masks = dict(frequency_masks=2, frequency_width=36, time_masks=4, time_width=48)
    sections.augment(config, modalities, spec_augment=masks, time_shift=True)
    config.model = sections.classifier(
        args.size,
        modalities=modalities,
        encoder=args.encoder,
        fusion_layer=sections.fusion_layer(
            args.fusion_layer, args.size, FUSION_LAYER if args.encoder == 'mbt' else None
        ),
        fusion=args.fusion,
        drop_path=0.3,
    )
    config.objective = sections.classification({'label': 'sigmoid'}, label_smoothing=0.3, mixup=args.mixup)
    config.optimizer = sections.sgd(3.2, warmup_epochs=2.5)  # 1.6 at a batch of 128.
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=2000)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=4000, num_clips=4)
    return config
