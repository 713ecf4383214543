"""Finetuning on spoken and handwritten digits: from what `configs/avmnist.py` pretrained, or from scratch.

    python -m avmae_jax.train --config=configs/finetune/avmnist.py --config.data.path=avmnist_shards \
        --config.start.path=PRETRAINED --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

Arguments: modalities=video+audio|video|audio, encoder=mbt|mid|early|separate|shared,
fusion=bottleneck|concatenation|late, fusion_layer=N, mixup=mixmod|mixup|none, augment=none|sound, probe=none|linear.
"""

import ml_collections

from configs import avmnist, sections


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments,
        modalities='video+audio',
        encoder='mbt',
        fusion='bottleneck',
        fusion_layer='2',
        mixup='none',
        augment='none',
        probe='none',
    )
    modalities = sections.parse_modalities(args.modalities)
    # Data, pictures and tokens are those of pretraining.
    config = avmnist.get_config(f'modalities={args.modalities}')
    pretrained = config.model
    config.num_epochs = 10.0
    config.preprocess.lose_modality_ratio = 0.0
    if sections.one_of('augment', args.augment, ('none', 'sound') if 'audio' in modalities else ('none',)) == 'sound':
        # Words stand at any moment of their clip: few labels do not say so. It takes more epochs than without.
        masks = dict(frequency_masks=1, frequency_width=24, time_masks=2, time_width=16)
        sections.augment(config, ('audio',), spec_augment=masks, time_shift=True)
    config.model = sections.classifier(
        pretrained.encoder.size.to_dict(),
        modalities=modalities,
        encoder=args.encoder,
        fusion_layer=sections.fusion_layer(args.fusion_layer, ''),
        fusion=args.fusion,
        drop_path=0.1,
    )
    config.model.tokenizers = pretrained.tokenizers
    config.model.compute = pretrained.compute
    config.objective = sections.classification({'label': 'softmax'}, label_smoothing=0.1, mixup=args.mixup)
    config.optimizer = sections.adamw(2.4e-2, warmup_epochs=1.0)  # 3e-3 at a batch of 32.
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.checkpoint = sections.checkpoint(every_steps=1000)
    config.report = sections.report(log_every_steps=50)
    config.evaluation = sections.evaluation(every_steps=200, max_batches=10)
    return config
