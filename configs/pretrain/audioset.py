"""Pretraining on AudioSet-2M, the released settings (Georgescu et al. 2023; Scenic av_mae audioset_pretrain).

    python -m avmae_jax.train --config=configs/pretrain/audioset.py:size=L --config.data.path=DIR --workdir=...

Arguments: size=Ti|S|B|L|H|g, encoder=mid|early|separate|shared, decoder=shared|separate|joint,
objective=reconstruction|inpainting|both, modalities=video+audio|video|audio|image+audio (one frame of a clip, as
CAV-MAE takes it), records=prepared|legacy.
"""

import ml_collections

from configs import sections

SECONDS = 10.0
MASK_RATIO = {'video': 0.9, 'audio': 0.7, 'image': 0.75}


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments,
        size='L',
        encoder='mid',
        decoder='shared',
        objective='reconstruction',
        modalities='video+audio',
        records='prepared',
    )
    modalities = sections.parse_modalities(args.modalities, ('video', 'audio', 'image'))
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 512
    config.num_epochs = 120.0
    config.data = sections.data(records=args.records)
    if 'video' in modalities:
        config.video = sections.video()
    if 'image' in modalities:
        config.image = dict(short_side=256, crop_size=224, crop='random', eval_crop='central')
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None, records=args.records)
    config.model = sections.model(args.size, modalities=modalities, encoder=args.encoder, decoder=args.decoder)
    config.objective = sections.objective(args.objective, mask_ratio={m: MASK_RATIO[m] for m in modalities})
    config.optimizer = sections.adam(3e-4, warmup_epochs=4.0)
    config.parallel = sections.parallel(rules='fsdp')
    config.checkpoint = sections.checkpoint(every_steps=3000)
    config.report = sections.report()
    config.evaluation = sections.evaluation(every_steps=6000)
    return config
