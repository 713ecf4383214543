"""Two minutes on two CPU cores: what `make demo` and the end-to-end test run.

    python -m avmae_jax.train --config=configs/tiny.py --config.data.path=DIR --workdir=...

Arguments: encoder=mid|early|separate|shared, decoder=shared|separate|joint,
objective=reconstruction|inpainting|both, modalities=video+audio|video|audio.
"""

import ml_collections

from configs import sections

SECONDS = 2.0
MASK_RATIO = {'video': 0.9, 'audio': 0.7}


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments, encoder='mid', decoder='shared', objective='reconstruction', modalities='video+audio'
    )
    modalities = sections.parse_modalities(args.modalities)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_steps = 300
    config.data = sections.data()
    if 'video' in modalities:
        config.video = sections.video(num_frames=8, short_side=112, crop_size=112)
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None)
    config.model = sections.model(
        dict(width=128, num_heads=4, mlp_width=512, num_layers=4),
        modalities=modalities,
        encoder=args.encoder,
        decoder=args.decoder,
        fusion_layers=1,
        decoder_size=dict(width=64, num_heads=2, mlp_width=256, num_layers=2),
    )
    config.model.compute.dtype = 'float32'  # A CPU has no bfloat16 units.
    config.objective = sections.objective(args.objective, mask_ratio={m: MASK_RATIO[m] for m in modalities})
    config.optimizer = sections.adam(1.6e-2, warmup_steps=30.0)
    config.parallel = sections.parallel()
    config.checkpoint = sections.checkpoint(every_steps=50)
    config.report = sections.report(log_every_steps=1, pictures_every_steps=100)
    config.evaluation = sections.evaluation(every_steps=100, max_batches=2)
    return config
