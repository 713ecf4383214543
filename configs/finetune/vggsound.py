"""Finetuning on VGGSound, the recipe of AV-MAE (Georgescu et al. 2023; Scenic av_mae vggsound finetune).

    python -m avmae_jax.train --config=configs/finetune/vggsound.py:size=L --config.data.path=DIR \
        --config.start.path=PRETRAINED --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

Arguments: size=Ti|S|B|L|H|g, modalities=video+audio|video|audio, encoder=mbt|mid|early|separate|shared,
fusion=bottleneck|concatenation|late, fusion_layer=N, mixup=mixmod|mixup|none, probe=none|linear,
records=prepared|legacy.
"""

import ml_collections

from configs import sections

SECONDS = 8.0


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
    modalities = sections.parse_modalities(args.modalities)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_epochs = 50.0
    config.data = sections.data(records=args.records)
    if 'video' in modalities:
        config.video = sections.video(num_frames=32, frame_seconds=0.08)
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None, records=args.records)
    masks = dict(frequency_masks=1, frequency_width=48, time_masks=4, time_width=48)
    sections.augment(config, modalities, spec_augment=masks)
    config.model = sections.classifier(
        args.size,
        modalities=modalities,
        encoder=args.encoder,
        fusion_layer=sections.fusion_layer(args.fusion_layer, args.size),
        fusion=args.fusion,
        drop_path=0.3,
    )
    config.objective = sections.classification({'label': 'softmax'}, label_smoothing=0.3, mixup=args.mixup)
    config.optimizer = sections.sgd(3.2, warmup_epochs=2.5)  # 0.8 at a batch of 64.
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=2000)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=4000, num_clips=4)
    return config
