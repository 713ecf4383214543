"""Pretraining on VGGSound, the released settings (Georgescu et al. 2023; Scenic av_mae vggsound_pretrain).

    python -m avmae_jax.train --config=configs/pretrain/vggsound.py:size=L --config.data.path=DIR --workdir=...

Arguments: size=Ti|S|B|L|H|g, encoder=separate|early|mid|shared, decoder=shared|separate|joint,
objective=reconstruction|inpainting|both, modalities=video+audio|video|audio, records=prepared|legacy.
"""

import ml_collections

from configs import sections

SECONDS = 8.0
MASK_RATIO = {'video': 0.9, 'audio': 0.5}


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments,
        size='L',
        encoder='separate',
        decoder='shared',
        objective='reconstruction',
        modalities='video+audio',
        records='prepared',
    )
    modalities = sections.parse_modalities(args.modalities)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 512
    config.num_epochs = 400.0
    config.data = sections.data(records=args.records)
    if 'video' in modalities:
        config.video = sections.video()
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None, records=args.records)
    config.model = sections.model(args.size, modalities=modalities, encoder=args.encoder, decoder=args.decoder)
    config.objective = sections.objective(args.objective, mask_ratio={m: MASK_RATIO[m] for m in modalities})
    config.optimizer = sections.adam(1.5e-4, warmup_epochs=4.0)
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=1000)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=2000)
    return config
