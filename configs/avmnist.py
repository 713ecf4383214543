"""Spoken and handwritten digits, 3,000 clips: pretraining that learns something within the hour on two CPU cores.

    python scripts/build_avmnist.py --fsdd=... --mnist=... --output=avmnist       (see docs/results.md)
    python -m avmae_jax.prepare --input=avmnist/avmnist.csv --output=avmnist_shards --short_side=40 --jpeg_quality=95
    python -m avmae_jax.train --config=configs/avmnist.py --config.data.path=avmnist_shards --workdir=RUN
    python -m avmae_jax.evaluate --workdir=RUN

Arguments: encoder=separate|shared|early|mid, decoder=shared|separate|joint,
objective=reconstruction|inpainting|both, modalities=video+audio|video|audio.
"""

import ml_collections

from configs import sections

SECONDS = 1.28
# Nine tenths of a picture this small would leave one patch of the digit.
MASK_RATIO = {'video': 0.6, 'audio': 0.75}


def get_config(arguments: str | None = None) -> ml_collections.ConfigDict:
    args = sections.parse_arguments(
        arguments, encoder='separate', decoder='shared', objective='reconstruction', modalities='video+audio'
    )
    modalities = sections.parse_modalities(args.modalities)
    config = ml_collections.ConfigDict()
    config.seed = 0
    # With 2,700 clips what counts is how many steps are taken: so batches, pictures and model are small.
    config.batch_size = 32
    config.num_epochs = 30.0
    config.data = sections.data()
    if 'video' in modalities:
        # A digit is 20 pixels high in 40, and no crop moves it: it moves by itself. Four frames span the clip.
        config.video = sections.video(num_frames=4, short_side=40, crop_size=40, frame_seconds=0.32)
    if 'audio' in modalities:
        config.audio = sections.audio(SECONDS)
    # A mirrored digit is no digit.
    config.preprocess = sections.preprocess(SECONDS if 'audio' in modalities else None, flip=False)
    # Strokes cover little of the picture: by its mean and deviation they weigh as much as the sound does.
    config.preprocess.rgb_mean = (0.0464,) * 3
    config.preprocess.rgb_std = (0.188,) * 3
    config.model = sections.model(
        dict(width=96, num_heads=4, mlp_width=384, num_layers=4),
        # As wide as the encoder: what a narrow decoder of one layer cannot do, the encoder's last layers do for it, and
        # its features of sound get worse than those of random initialisation.
        decoder_size=dict(width=96, num_heads=4, mlp_width=384, num_layers=2),
        modalities=modalities,
        encoder=args.encoder,
        decoder=args.decoder,
    )
    if 'video' in modalities:
        config.model.tokenizers.video.patch = (4, 5, 5)
        config.model.tokenizers.video.positions = 'sincos_3d'
    if 'audio' in modalities:
        config.model.tokenizers.audio.patch = (16, 32)
        config.model.tokenizers.audio.positions = 'sincos_2d'
    config.model.compute.dtype = 'float32'  # A CPU has no bfloat16 units.
    config.model.compute.scan = False  # Four layers written out are faster there than a loop.
    config.objective = sections.objective(
        args.objective, mask_ratio={m: MASK_RATIO[m] for m in modalities}, standardise='none'
    )
    config.optimizer = sections.adam(1.6e-2, warmup_epochs=3.0)
    config.parallel = sections.parallel()
    config.checkpoint = sections.checkpoint(every_steps=1000)
    config.report = sections.report(log_every_steps=100, pictures_every_steps=1000)
    config.evaluation = sections.evaluation(every_steps=500, max_batches=10)
    return config
