"""The sections that most configs share. Numbers and words only: configs import nothing of the package.

A section is the arguments of a constructor, named beside it; what a section leaves out is the constructor's default
and cannot be set by a flag, so everything anybody may want to set is written here.
"""

from __future__ import annotations

import difflib

import ml_collections
from ml_collections import config_dict

LAYERS = {
    'Ti': 12,
    'S': 12,
    'B': 12,
    'L': 24,
    'H': 32,
    'g': 40,
}  # Of models/sizes.py; configs count fusion layers in them.
ENCODERS = ('early', 'separate', 'shared', 'mid')
DECODERS = ('shared', 'separate', 'joint')
RECORDS = ('prepared', 'legacy')
FUSIONS = ('bottleneck', 'concatenation', 'late')
MIXUPS = ('none', 'mixup', 'mixmod')
PROBES = ('none', 'linear')
OBJECTIVES = ('reconstruction', 'inpainting', 'both')


def parse_arguments(text: str | None, **defaults: str) -> ml_collections.ConfigDict:
    """'size=B,encoder=mid' over the defaults: the choices that change which keys a config has."""
    found = dict(defaults)
    for part in filter(None, (text or '').split(',')):
        name, equals, value = part.partition('=')
        if not equals or name not in defaults:
            if not defaults:
                raise ValueError(f'Config argument {part!r}: this config has none.')
            close = difflib.get_close_matches(name, defaults, n=1)
            raise ValueError(
                f'Config argument {part!r}: the arguments are {", ".join(f"{k}={v}" for k, v in defaults.items())}, '
                'separated by commas' + (f'; did you mean {close[0]}=...?' if close else '.')
            )
        found[name] = value
    return ml_collections.ConfigDict(found)


def one_of(name: str, value: str, choices) -> str:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        raise ValueError(
            f'Config argument {name}={value}: it is one of {", ".join(choices)}'
            + (f'; did you mean {close[0]}?' if close else '.')
        )
    return value


def parse_modalities(value: str, choices=('video', 'audio')) -> tuple[str, ...]:
    """'audio' or 'video+audio'."""
    return tuple(one_of('modalities', name, choices) for name in value.split('+'))


def data(split: str = 'train', records: str = 'prepared') -> dict:
    """Where clips come from and how they are read: data/sources.py, data/mixing.py, data/batches.py.

    Args:
      records: 'prepared' shards, or 'legacy': the SequenceExamples of the public reference, with stored log-mels.
    """
    one_of('records', records, RECORDS)
    section = dict(
        # A folder that `prepare` wrote, or several with commas between; one whose own name has commas is taken whole.
        path='',
        data_dir=config_dict.placeholder(str),  # Of tensorflow_datasets, for a path 'tfds:NAME'.
        split=split,
        subset_ratio=1.0,  # Train on this share of the clips, of each class alike: for learning from few labels.
        # A head of the labels whose rare classes are drawn as often as its common ones; '' draws all clips alike.
        balanced_by='',
        weights=(),  # How often each of several folders is drawn from; () is by number of clips.
        verify=config_dict.placeholder(str),  # 'size', 'framing' or 'full'.
        views_per_clip=1,
        share_window=True,
        num_workers=config_dict.placeholder(int),  # None: by the cores of this machine.
        num_threads=2,
        max_damaged_ratio=0.01,
        stall_seconds=300.0,
    )
    if records == 'legacy':
        section['legacy'] = dict(spectrogram_shape=(100, 128), fps=25.0, num_classes=config_dict.placeholder(int))
    return section


def video(num_frames: int = 16, short_side: int = 256, crop_size: int = 224, frame_seconds: float = 0.16) -> dict:
    """data/views.py: VideoView. The recipe's stride of 4 at 25 frames a second is 0.16 s."""
    return dict(
        num_frames=num_frames,
        frame_seconds=frame_seconds,
        short_side=short_side,
        crop_size=crop_size,
        crop='random',
        eval_crop='central',
    )


def audio(seconds: float) -> dict:
    """data/views.py: AudioView."""
    return dict(seconds=seconds)


def preprocess(seconds: float | None = None, flip: bool = True, records: str = 'prepared') -> dict:
    """ops/preprocess.py: Preprocess. Without a mean and deviation those of the dataset are taken.

    Args:
      seconds: of sound; None for none.
    """
    # Scaled to [-1, 1]; models of others may want ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).
    section: dict = dict(flip=flip, rgb_mean=(0.5, 0.5, 0.5), rgb_std=(0.5, 0.5, 0.5))
    if seconds is not None:
        section |= dict(
            convention='avmae',
            num_mel_bins=128,
            num_spec_frames=round(100 * seconds),
            audio_mean=config_dict.placeholder(float),
            audio_std=config_dict.placeholder(float),
        )
        if records == 'legacy':  # Log-mels as they come: the reference's pretraining does not normalise them either.
            section |= dict(convention='stored', audio_mean=0.0, audio_std=1.0)
    return section


def model(
    size: str | dict,
    *,
    modalities: tuple[str, ...],
    encoder: str,
    decoder: str,
    fusion_layers: int = 2,
    decoder_size: str | dict | None = None,
) -> dict:
    """models/: tokenizers, an encoder, a decoder, and how they are computed.

    Args:
      size, decoder_size: a name of models/sizes.py, or the numbers.
      fusion_layers: how many of the last layers are joint in the encoder `mid`.
    """
    if isinstance(size, str):
        one_of('size', size, LAYERS)
    one_of('encoder', encoder, ENCODERS)
    one_of('decoder', decoder, DECODERS)
    patch = {'video': (2, 16, 16), 'audio': (16, 16), 'image': (16, 16)}
    section = dict(
        tokenizers={
            modality: dict(
                patch=patch[modality],
                stride=config_dict.placeholder(tuple),  # None: patches lie side by side.
                positions='sincos_1d',
                modality_token=False,
                class_token=False,
                class_position=False,
                distillation_token=False,
            )
            for modality in modalities
        },
        encoder=dict(name=encoder, size=size, **final_norm()),
        decoder=dict(
            name=decoder,
            size=decoder_size or size,
            positions='sincos_1d',
            modality_token=False,
            class_position=False,
            projection_bias=True,
            **final_norm(),
        ),
        architecture=dict(gelu='tanh', norm_epsilon=1e-6, qkv_bias=True),
        compute=dict(dtype='bfloat16', scan=True, remat='none', attention='auto'),
    )
    if encoder == 'mid':
        num_layers = LAYERS[size] if isinstance(size, str) else size['num_layers']
        section['encoder']['fusion_layer'] = num_layers - fusion_layers
    return section


def final_norm() -> dict:
    """Of an encoder or a decoder: whether it ends with a norm, and what that adds to the variance."""
    # None: as the norms of the blocks, architecture.norm_epsilon.
    return dict(final_norm=True, final_norm_epsilon=config_dict.placeholder(float))


def objective(kind: str, *, mask_ratio: dict, standardise: str = 'none') -> dict:
    """objectives/: what is hidden and what is asked."""
    one_of('objective', kind, OBJECTIVES)
    term = dict(
        weight={modality: 1 / len(mask_ratio) for modality in mask_ratio},
        target={modality: dict(standardise=standardise) for modality in mask_ratio},
        on_all_tokens=False,
    )
    terms = {}
    if kind in ('reconstruction', 'both'):
        terms['reconstruction'] = dict(term)
    if kind in ('inpainting', 'both'):
        if len(mask_ratio) != 2:
            raise ValueError(f'Config argument objective={kind}: inpainting needs two modalities.')
        terms['inpainting'] = dict(term, shuffle=False)
    return dict(mask_ratio=dict(mask_ratio), masking=dict.fromkeys(mask_ratio, 'random'), terms=terms)


def fusion_layer(argument: str, size: str, table: dict | None = None) -> int | None:
    """The argument fusion_layer=N as a number; '' is what the table has for the size, or None."""
    if not argument:
        return (table or {}).get(size)
    if not argument.isdigit():
        raise ValueError(f'Config argument fusion_layer={argument}: it is a number of layers, from 0 on.')
    return int(argument)


def classifier(
    size: str | dict,
    *,
    modalities: tuple[str, ...],
    encoder: str = 'mbt',
    fusion_layer: int | None = None,
    fusion: str = 'bottleneck',
    drop_path: float = 0.0,
) -> dict:
    """models/classifier.py: tokenizers, an encoder, a pooling and a head for each head of the labels.

    Args:
      size: a name of models/sizes.py, or the numbers.
      encoder: 'mbt', or one of the autoencoder's.
      fusion_layer: of MBT, the first layer that exchanges; None: two thirds up, as MBT-B (8 of 12). Of 'mid', the first
        joint layer; None: the last two are.
      fusion: of MBT, how its streams exchange: one of FUSIONS; 'late' is a fusion layer behind the last.
    """
    if isinstance(size, str):
        one_of('size', size, LAYERS)
    one_of('encoder', encoder, (*ENCODERS, 'mbt'))
    one_of('fusion', fusion, FUSIONS)
    if encoder != 'mbt' and fusion != 'bottleneck':
        raise ValueError(f'Config argument fusion={fusion}: it is of the encoder mbt; got encoder={encoder}.')
    num_layers = LAYERS[size] if isinstance(size, str) else size['num_layers']
    section = model(size, modalities=modalities, encoder='shared', decoder='shared')
    del section['decoder']
    section['encoder'] = dict(name=encoder, size=size, drop_path=drop_path, **final_norm())
    if encoder == 'mbt':
        layer = 2 * num_layers // 3 if fusion_layer is None else fusion_layer
        section['encoder'] |= dict(
            fusion_layer=num_layers if fusion == 'late' else layer,
            fusion='concatenation' if fusion == 'concatenation' else 'bottleneck',
            num_bottlenecks=4,
            shared_weights=False,
            test_with_bottlenecks=True,
        )
    elif encoder == 'mid':
        section['encoder']['fusion_layer'] = num_layers - 2 if fusion_layer is None else fusion_layer
    return section | dict(
        pooling='mean',
        pooled_norm=False,
        pooled_norm_epsilon=config_dict.placeholder(float),  # None: architecture.norm_epsilon.
        representation=config_dict.placeholder(int),
    )


def classification(
    heads: dict, *, label_smoothing: float = 0.0, mixup: str = 'none', alpha: float = 0.5, cutmix: float | None = None
) -> dict:
    """objectives/classification.py.

    Args:
      heads: head of the labels -> 'softmax' (one class a clip) or 'sigmoid' (several).
      mixup: one of MIXUPS; 'mixmod' draws a share, and so labels, for each modality.
      cutmix: the exponent of its shares; None for none.
    """
    one_of('mixup', mixup, MIXUPS)
    section: dict = dict(
        heads=dict(heads), weight={head: 1 / len(heads) for head in heads}, label_smoothing=label_smoothing
    )
    if mixup != 'none':
        section['mixup'] = dict(alpha=alpha, per_modality=mixup == 'mixmod')
    if cutmix is not None:
        section['cutmix'] = dict(alpha=cutmix)
    return section


def augment(config, modalities: tuple[str, ...], *, spec_augment: dict | None = None, time_shift: bool = False) -> None:
    """What finetuning changes in pictures and sound, put into a config: ops/augment.py, and jitter of the scale."""
    for modality in {'video', 'image'} & set(modalities):
        del config[modality].crop  # The name of a crop may become one with settings.
        config[modality].crop = dict(name='random', scale=(0.9, 1.33))
        config.preprocess.color_jitter = dict(
            jitter_ratio=0.8, drop_ratio=0.1, brightness=32 / 255, contrast=0.4, saturation=0.4, hue=0.2
        )
    if 'audio' in modalities:
        config.preprocess.time_shift = time_shift
        if spec_augment is not None:
            # The released settings have a time_ratio of 0, which switches time masks off.
            config.preprocess.spec_augment = dict(spec_augment, time_ratio=1.0)
    config.preprocess.lose_modality_ratio = 0.0


def probe(config, kind: str) -> None:
    """Turns a finetuning config into a probe of frozen features: nothing moves but the head.

    Args:
      kind: 'none' leaves the config alone; 'linear' freezes tokenizers and encoder.
    """
    if one_of('probe', kind, PROBES) == 'none':
        return
    config.optimizer.frozen = ('tokenizers', 'encoder/')
    config.optimizer.layer_decay = None
    config.model.encoder.drop_path = 0.0
    config.objective.label_smoothing = 0.0
    for mixing in ('mixup', 'cutmix'):
        if mixing in config.objective:
            del config.objective[mixing]


def start() -> dict:
    """What training begins with: checkpoints/transfer.py. An empty path is training from scratch."""
    return dict(
        # A run, or a checkpoint of one: an autoencoder with any encoder, or a classifier; or a ViT of images, FILE.npz.
        path='',
        trunk=False,  # Take tokenizers and encoder as they are there, whatever config.model says of them.
        heads=False,  # Take the heads too, from a classifier of the same classes.
        divide_stem=True,  # An audio stem that gets three channels is divided by three.
        inflation='central',  # How a stem of images becomes one of video: 'central' frame, or 'average' over frames.
    )


def tailored(layer_decay: float | None = None, frozen: tuple = (), average_decay: float | None = None) -> dict:
    """training/optimizer.py: rates that fall with depth, what is frozen, and a moving average of the parameters."""
    given = config_dict.placeholder(float)
    return dict(
        layer_decay=given if layer_decay is None else layer_decay,
        frozen=tuple(frozen),  # Beginnings of parameter paths, as regular expressions.
        average_decay=config_dict.placeholder(float) if average_decay is None else average_decay,
    )


def sgd(base_learning_rate: float, *, clip_norm: float | None = 1.0, **warmup: float) -> dict:
    """training/optimizer.py: SGD with momentum. The rate is for a batch of 256, as everywhere."""
    return dict(
        name='sgd',
        base_learning_rate=base_learning_rate,
        **warmup,
        end_ratio=0.0,
        momentum=0.9,
        clip_norm=config_dict.placeholder(float) if clip_norm is None else clip_norm,
        accumulate_steps=1,
    )


def adamw(base_learning_rate: float, *, weight_decay: float = 0.05, **warmup: float) -> dict:
    """training/optimizer.py: AdamW as ViTs are finetuned with it."""
    return dict(
        name='adamw',
        base_learning_rate=base_learning_rate,
        **warmup,
        end_ratio=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=weight_decay,
        clip_norm=config_dict.placeholder(float),
        first_moment_dtype='float32',
        accumulate_steps=1,
    )


def adam(base_learning_rate: float, **warmup: float) -> dict:
    """training/optimizer.py. The rate is for a batch of 256; `warmup` is warmup_epochs=... or warmup_steps=..."""
    return dict(
        name='adam',
        base_learning_rate=base_learning_rate,
        **warmup,
        end_ratio=0.0,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.05,
        clip_norm=config_dict.placeholder(float),
        first_moment_dtype='float32',
        accumulate_steps=1,
    )


def parallel(rules: str = 'replicated') -> dict:
    """parallel/: the mesh, one of rules.RULES, and how soon a job ends that cannot go on (docs/reliability.md).

    Mesh: copies of the state (`replica`; across slices or nodes), devices that share the batch and, under fsdp, the
    state (`data`), devices that share a layer under tensor and fsdp_tensor (`model`); -1: what is left.
    """
    return dict(
        rules=rules,
        replica=1,
        data=-1,
        model=1,
        watchdog_seconds=1800.0,  # Without a step for that long, a process tells its stacks and ends; 0: never.
        heartbeat_seconds=100,  # Without a sign of life of a process for that long, the others end.
    )


def checkpoint(every_steps: int, keep_last: int = 2, keep_best: int = 1) -> dict:
    """checkpoints/manager.py."""
    return dict(every_steps=every_steps, keep_last=keep_last, keep_best=keep_best)


def report(log_every_steps: int = 50, pictures_every_steps: int = 5000) -> dict:
    """training/report.py, and how often reconstructions are painted (0: never)."""
    return dict(
        log_every_steps=log_every_steps,
        pictures_every_steps=pictures_every_steps,
        num_pictures=4,
        wait_share_warning=0.05,
        profile_first_step=config_dict.placeholder(int),
        profile_num_steps=5,
    )


def evaluation(every_steps: int, split: str = 'test', max_batches: int = 20, num_clips: int = 1) -> dict:
    """The loss on another split while training, with the same masks every time; it ranks checkpoints. 0: never.

    Args:
      num_clips: moments of each clip that `python -m avmae_jax.evaluate` averages over.
    """
    return dict(every_steps=every_steps, split=split, max_batches=max_batches, num_clips=num_clips)
