"""MBT-B on AudioSet from a ViT trained on ImageNet-21k (Nagrani et al. 2021; Scenic mbt balanced_audioset_base).

    python -m avmae_jax.train --config=configs/finetune/audioset_mbt.py --config.data.path=DIR \
        --config.start.path=ViT-B_16.npz --workdir=RUN

Arguments: size=Ti|S|B|L|H|g, modalities=video+audio|video|audio, fusion=bottleneck|concatenation|late, fusion_layer=N,
mixup=mixup|mixmod|none, probe=none|linear, records=prepared|legacy.
"""

import ml_collections

from configs import sections

SECONDS = 8.0


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments,
        size='B',
        modalities='video+audio',
        fusion='bottleneck',
        fusion_layer='',
        mixup='mixup',
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
    if 'audio' in modalities and args.records == 'legacy':
        # Of the reference's own log-mels, over AudioSet. Those of ours `prepare` measures, as pretraining takes them.
        config.preprocess.update(audio_mean=1.102, audio_std=2.762)
    masks = dict(frequency_masks=1, frequency_width=48, time_masks=4, time_width=48)
    sections.augment(config, modalities, spec_augment=masks)
    config.model = sections.classifier(
        args.size,
        modalities=modalities,
        fusion_layer=sections.fusion_layer(args.fusion_layer, args.size),
        fusion=args.fusion,
        drop_path=0.3,
    )
    for modality in modalities:  # Those of the image, resized and repeated over time.
        config.model.tokenizers[modality].positions = 'learned'
    config.objective = sections.classification({'label': 'sigmoid'}, label_smoothing=0.3, mixup=args.mixup)
    config.optimizer = sections.sgd(2.0, warmup_epochs=2.5)  # 0.5 at a batch of 64.
    config.optimizer.update(sections.tailored())
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=500)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=1000, num_clips=4)
    return config
