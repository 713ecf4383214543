"""One line gives a trained model, preprocessing included:

    model = avmae_jax.load_pretrained('DIR')        # what `python -m avmae_jax.export` wrote, or a run
    model.encode(video=frames, audio=waveform)          # modality -> tokens [b n d]
    model.embed(video=frames, fps=25)                   # modality -> features [b d]
    model.classify(audio=waveform, sample_rate=44100)   # head -> logits [b classes], of a finetuned model
    model.reconstruct(video=frames, audio=waveform)     # modality -> what a pretrained model makes of hidden patches

Any subset of the modalities that the model knows may be given, as numpy or jax arrays (or what numpy takes for one):

    video    uint8 [b t h w 3], RGB. With `fps`, whole clips: the frames that the model wants are taken from their
             middle. Without, those frames themselves.
    image    uint8 [b h w 3], RGB.
    audio    float [b l] in [-1, 1], or int16, of one channel, at `sample_rate`: that of the model if not given; other
             rates are resampled. The middle is taken; silence fills up what is too short. A model that was trained on
             stored log-mels takes those: float32 [b s f].

Pictures of another size are resized and their middle is cut out. All of this is what `python -m avmae_jax.evaluate`
does to a clip, so that both come to the same features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from avmae_jax import experiment
from avmae_jax.checkpoints.manager import DIGESTS_FILE
from avmae_jax.data.views import AudioView, View
from avmae_jax.exports import functions, native
from avmae_jax.exports.functions import Rebuilt
from avmae_jax.exports.rows import make_rows
from avmae_jax.exports.trained import DTYPES, Trained, nested_params, rebuild_preprocessing
from avmae_jax.ops.preprocess import STORED, Preprocess
from avmae_jax.settings import Config, fits, override
from avmae_jax.structs import Array, Modality
from avmae_jax.weights import bounds

MAX_SAMPLES = 2**31  # Of a row; an hour at 48 kHz has 2**27.
# What comes of JSON that says something else than was written.
WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Pretrained:
    """A trained model and what comes before it.

    Attributes:
      trained: all that belongs to it: `trained.model` is the flax module, `trained.about` says where it comes from.
      params: as `trained.model.apply({'params': params}, inputs, ...)` takes them.
      modalities: those that it knows.
      row_shapes: modality -> shape of one row as the model takes it; other shapes are cut to it.
      labels: head -> names of its classes; {} for a pretrained model.
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        self.params = jax.tree.map(jnp.asarray, trained.params)
        self.modalities = trained.modalities
        self.row_shapes = trained.row_shapes
        self.labels = {head: trained.info.labels[head].names for head in trained.heads}
        self._compiled: dict[Any, Any] = {
            name: jax.jit(functools.partial(f, trained)) for name, f in functions.FUNCTIONS.items()
        }

    def encode(self, **media: Any) -> dict[Modality, Float[Array, 'b _n d']]:
        """Tokens after the encoder, by modality; nothing is hidden. A class token, where there is one, comes first.

        Args:
          media: video, image, audio, fps, sample_rate, as the head of this file tells.
        """
        return self._compiled['encode'](self.params, self.rows(**media))

    def embed(self, **media: Any) -> dict[Modality, Float[Array, 'b d']]:
        """One vector a clip and modality, float32: the mean over its tokens, class tokens left out.

        Where modalities meet in the encoder, each has taken from the others that are given.
        """
        return self._compiled['embed'](self.params, self.rows(**media))

    def classify(self, **media: Any) -> dict[str, Float[Array, 'b _c']]:
        """Head -> logits of the classes in the order of `labels`, float32; the mean over what is given."""
        if not self.labels:
            raise ValueError('this model was pretrained and has no classes: finetune it first, or use embed.')
        return self._compiled['classify'](self.params, self.rows(**media))

    def reconstruct(self, *, seed: int = 0, mask_ratio: Any = None, **media: Any) -> dict[Modality, Rebuilt]:
        """What the model makes of patches that it does not see.

        Args:
          seed: of what is hidden.
          mask_ratio: by modality, the share that is hidden; that of training where nothing is given.
        """
        if self.labels:
            raise ValueError('this model was finetuned to name classes and cannot rebuild: take the pretrained one.')
        if not isinstance(mask_ratio, Mapping | None):
            raise ValueError(f'mask_ratio={mask_ratio!r}: give a ratio for each modality, such as {{"audio": 0.5}}.')
        for name, ratio in (mask_ratio or {}).items():
            if name not in self.trained.objective.mask_ratio:
                known = ', '.join(self.trained.objective.mask_ratio)
                raise ValueError(f'mask_ratio={mask_ratio!r}: the model knows no {name!r}; name one of {known}.')
            if not isinstance(ratio, int | float | np.floating) or not 0 <= ratio < 1:
                raise ValueError(f'mask_ratio={mask_ratio!r}: {name} must be a number in [0, 1).')
        ratios = tuple(sorted((mask_ratio or {}).items()))
        if ratios not in self._compiled:
            reconstruct = functools.partial(functions.reconstruct, self.trained, mask_ratio=dict(ratios))
            self._compiled[ratios] = jax.jit(reconstruct)
        return self._compiled[ratios](self.params, self.rows(**media), jax.random.key(seed))

    def rows(self, *, fps: Any = None, sample_rate: Any = None, **media: Any) -> dict[Modality, Array]:
        """Media in the shapes `row_shapes`: the windows and crops that the model is shown."""
        media = {m: x for m, x in media.items() if x is not None}
        return make_rows(self.trained, media, fps, sample_rate)

    def inputs(self, **media: Any) -> dict[Modality, Float[Array, 'b ...']]:
        """What `trained.model` is given: float32 pixels and log-mels, normalised."""
        return functions.make_inputs(self.trained, self.rows(**media))


def load_pretrained(path: epath.PathLike, *, dtype: str | None = None) -> Pretrained:
    """The model that an export holds, or a run: there its newest whole checkpoint, or the one named.

    Args:
      path: a folder that `python -m avmae_jax.export` wrote; or a workdir, or RUN/checkpoints/STEP, of which the moving
        average of the parameters is taken where the run kept one.
      dtype: 'float32' or 'bfloat16', of activations; that of training if not given.
    """
    folder = epath.Path(path)
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype={dtype!r} is none of {", ".join(DTYPES)}.')
    return Pretrained(read_export(folder, dtype) if native.is_export(folder) else read_run(folder, dtype=dtype))


def read_export(folder: epath.Path, dtype: str | None = None) -> Trained:
    """What an export holds; refused with a sentence unless every file is the one that was written."""
    stored = native.read(folder)
    sections = _with_dtype({name: stored.config[name] for name in native.SECTIONS}, dtype)
    with _reading(folder / native.CONFIG):
        model, objective = experiment.build_model(sections, stored.info), experiment.build_objective(sections)
        shapes = _read_shapes(stored.config['input_shapes'], model)
        bounds.check(model, stored.arrays, shapes)
        wanted = jax.eval_shape(experiment.make_init_params(model, objective, shapes), jax.random.key(0))
    with _reading(folder / native.PREPROCESSING):
        view, preprocess = rebuild_preprocessing(stored.preprocessing)
        _compare_shapes(shapes, view, preprocess)
    try:
        params = nested_params(stored.arrays, wanted, model.encoder.compute.scan)
    except ValueError as error:
        raise ValueError(f'{folder / native.WEIGHTS}: {error}') from error
    about = stored.config['about']
    return Trained(model, params, objective, view, preprocess, stored.info, shapes, sections, about)


def read_run(
    checkpoint: epath.PathLike, *, averaged: bool = True, average_last: int = 1, dtype: str | None = None
) -> Trained:
    """What a run holds.

    Args:
      checkpoint: a workdir, its folder of checkpoints, or one of them.
      averaged: the moving average of the parameters, where the run kept one and `average_last` is 1.
      average_last: the mean over the parameters of so many checkpoints, this one and those before it.
    """
    if average_last < 1:
        raise ValueError(f'average_last must be at least 1; got {average_last}.')
    restored = experiment.restore_model(checkpoint, averaged=averaged and average_last == 1)
    folders = _last_checkpoints(restored.folder, average_last)
    params = restored.params if average_last == 1 else _mean_params(restored, folders)
    meta = restored.meta
    config = _with_dtype(meta['config'], dtype)
    unchanged: dict[str, Any] = dict.fromkeys(experiment.AUGMENTATIONS)
    return Trained(
        model=experiment.build_model(config, restored.info),
        params=params,
        objective=experiment.build_objective(config),
        view=experiment.build_view(config),
        preprocess=dataclasses.replace(experiment.build_preprocess(config, restored.info), flip=False, **unchanged),
        info=restored.info,
        shapes={modality: tuple(shape) for modality, shape in meta['input_shapes'].items()},
        config=dict(config),
        about={
            'checkpoint': str(restored.folder),
            'step': int(restored.folder.name),
            'digest': hashlib.sha256((restored.folder / DIGESTS_FILE).read_bytes()).hexdigest(),
            'trained_on': meta['dataset']['digest'],
            'averaged': restored.averaged,
            'averaged_steps': [int(folder.name) for folder in folders],
            'trained_with': meta['versions'],
            'versions': experiment.versions(),
        },
    )


def _with_dtype(config: Config, dtype: str | None) -> dict[str, Any]:
    return dict(config) if dtype is None else override(config, {'model.compute.dtype': dtype})


@contextlib.contextmanager
def _reading(file: epath.Path) -> Iterator[None]:
    """Tells of whatever a JSON file makes go wrong with its name."""
    try:
        yield
    except WRONG as error:
        why = error if isinstance(error, ValueError) else f'it does not tell what the model is: {error!r}'
        raise ValueError(f'{file}: {why}') from error


def _read_shapes(described: Any, model: experiment.Model) -> dict[Modality, tuple[int, ...]]:
    """Modality -> shape of one row."""
    where = 'input_shapes'
    if not isinstance(described, Mapping) or set(described) != set(model.tokenizers):
        raise ValueError(f'{where} is {described!r:.80}, and due is a shape for each of {", ".join(model.tokenizers)}.')
    for modality, shape in described.items():
        axes = {'video': 4, 'image': 3, 'audio': 2}[modality]
        if not fits(shape, tuple[int, ...]) or len(shape) != axes:
            raise ValueError(f'{where}.{modality} is {shape!r:.80}, where {axes} sizes were due.')
    return {modality: tuple(shape) for modality, shape in described.items()}


def _compare_shapes(shapes: Mapping[Modality, tuple[int, ...]], view: View, preprocess: Preprocess) -> None:
    """Refuses a preprocessing that makes other rows than the model takes."""
    for modality, shape in shapes.items():
        part = view.parts.get(modality)
        if part is None:
            raise ValueError(f'it says nothing of {modality}.')
        if not isinstance(part, AudioView):
            made = part.shape
        elif preprocess.convention == STORED:
            made = shape  # That of the data, whatever it was.
        else:
            samples = round(part.seconds * preprocess.sample_rate)
            if not 0 < samples <= MAX_SAMPLES:
                raise ValueError(f'it makes {samples} samples of {modality}, and from 1 to {MAX_SAMPLES} are read.')
            frames = preprocess.num_spec_frames or preprocess.log_mel_convention.num_frames(samples)
            made = (frames, preprocess.num_mel_bins)
        if made != shape:
            raise ValueError(f'it makes {modality} of shape {made}, and by {native.CONFIG} the model takes {shape}.')


def _last_checkpoints(newest: epath.Path, count: int) -> list[epath.Path]:
    """The folders of a checkpoint and of those before it, newest first."""
    steps = sorted((int(child.name) for child in newest.parent.iterdir() if child.name.isdigit()), reverse=True)
    steps = [step for step in steps if step <= int(newest.name)][:count]
    if len(steps) < count:
        raise ValueError(
            f'{newest.parent} has {len(steps)} checkpoints up to step {newest.name}, and the mean of {count} is asked '
            'for: set average_last lower, or train with a higher checkpoint.keep_last.'
        )
    return [newest.parent / str(step) for step in steps]


def _mean_params(newest: experiment.RestoredModel, folders: list[epath.Path]) -> Any:
    """The mean, summed in float64."""
    total = jax.tree.map(np.float64, newest.params)
    for folder in folders[1:]:
        params = experiment.restore_model(folder, averaged=False).params
        total = jax.tree.map(lambda sum_, x: sum_ + x, total, params)
    return jax.tree.map(lambda sum_: (sum_ / len(folders)).astype(np.float32), total)
