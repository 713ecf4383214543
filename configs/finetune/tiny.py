"""Finetuning on the clips of `make demo`, in a minute or two on a laptop CPU, from what `configs/tiny.py` pretrained.

    python -m avmae_jax.train --config=configs/finetune/tiny.py --config.data.path=demo/dataset \
        --config.start.path=demo/run --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

Arguments: modalities=video+audio|video|audio, encoder=mbt|mid|early|separate|shared,
fusion=bottleneck|concatenation|late, mixup=mixmod|mixup|none, probe=none|linear.
"""

import ml_collections

from configs import sections, tiny


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments, modalities='video+audio', encoder='mbt', fusion='bottleneck', mixup='mixmod', probe='none'
    )
    modalities = sections.parse_modalities(args.modalities)
    # Data, pictures and tokens are those of pretraining.
    config = tiny.get_config(f'modalities={args.modalities}')
    pretrained = config.model
    config.num_steps = 150
    masks = dict(frequency_masks=1, frequency_width=16, time_masks=1, time_width=16)
    sections.augment(config, modalities, spec_augment=masks)
    config.model = sections.classifier(
        pretrained.encoder.size.to_dict(),
        modalities=modalities,
        encoder=args.encoder,
        # 'mid' goes on with the joint layers that it was pretrained with.
        fusion_layer=pretrained.encoder.fusion_layer if args.encoder == 'mid' else None,
        fusion=args.fusion,
        drop_path=0.1,
    )
    config.model.tokenizers = pretrained.tokenizers
    config.model.compute = pretrained.compute
    config.objective = sections.classification({'label': 'softmax'}, label_smoothing=0.1, mixup=args.mixup)
    config.optimizer = sections.adamw(1.6e-2, warmup_steps=15.0)
    config.optimizer.update(sections.tailored(layer_decay=0.75))
    sections.probe(config, args.probe)
    config.start = sections.start()
    config.evaluation = sections.evaluation(every_steps=75, max_batches=10)
    return config
