"""Trained: a model with its parameters and all that belongs to it; what every format is made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from avmae_jax.data.schema import DatasetInfo
from avmae_jax.data.views import AudioView, ImageView, VideoView, View
from avmae_jax.models.blocks import stack_layers, unstack_layers
from avmae_jax.ops.preprocess import STORED, Preprocess
from avmae_jax.settings import check_kinds, kinds_of
from avmae_jax.structs import Modality
from avmae_jax.weights.table import Arrays, Row, apply_rows, flatten, keep, unflatten

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def published(about: Mapping[str, Any]) -> dict[str, Any]:
    """`Trained.about` as others may see it: of the checkpoint's path, NAME/checkpoints/STEP."""
    kept = {'checkpoint': '/'.join(str(about['checkpoint']).split('/')[-3:])} if 'checkpoint' in about else {}
    return {**about, **kept}


class Trained(NamedTuple):
    """
    Attributes:
      model: a MaskedAutoencoder or a Classifier.
      params: numpy arrays, nested as the model lays them out.
      objective: what it was trained for.
      view, preprocess: what it is shown of a clip, and how.
      info: the dataset it was trained on, without shards.
      shapes: modality -> shape of one row as the model gets it.
      config: what it was built from: the whole of its run's, or of an export the sections model and objective.
      about: where it comes from: run, step, digests.
    """

    model: Any
    params: Any
    objective: Any
    view: View
    preprocess: Preprocess
    info: DatasetInfo
    shapes: dict[Modality, tuple[int, ...]]
    config: dict[str, Any]
    about: dict[str, Any]

    @property
    def modalities(self) -> list[Modality]:
        """Those that the model knows, in the order of `structs.JOINT_ORDER`."""
        return [m for m in self.view.parts if m in self.model.tokenizers]

    def alone(self, modality: Modality) -> Trained:
        """The same model, shown one of its modalities and no other."""
        if modality not in self.modalities:
            raise ValueError(f'--modality={modality} is none of {", ".join(self.modalities)}.')
        part: Any = {modality: self.view.parts[modality]}
        return self._replace(view=View(**part))

    @property
    def heads(self) -> dict[str, int]:
        """Head -> classes; {} for an autoencoder."""
        return dict(getattr(self.model, 'num_classes', {}))

    @property
    def row_shapes(self) -> dict[Modality, tuple[int, ...]]:
        """Modality -> shape of one row as people give it: pixels, samples (or stored log-mels)."""
        shapes = {m: self.shapes[m] for m in self.modalities}
        if 'audio' in shapes and self.preprocess.convention != STORED:
            assert self.view.audio is not None
            shapes['audio'] = (round(self.view.audio.seconds * self.preprocess.sample_rate),)
        return shapes


def named_arrays(params: Mapping[str, Any]) -> Arrays:
    """'path/to/parameter' -> array, layer by layer however the model lays its layers out."""
    return {name: np.asarray(array) for name, array in flatten(unstack_layers(dict(params))).items()}


def nested_params(arrays: Mapping[str, np.ndarray], wanted: Any, scan: bool) -> Any:
    """Undoes `named_arrays`; an array too many, one too few and one of another shape are errors.

    Args:
      wanted: the parameters of the model as shapes, as it lays them out.
      scan: whether it lays layers on top of each other.
    """
    looped = jax.eval_shape(lambda tree: unstack_layers(tree), wanted)
    shapes = {name: leaf.shape for name, leaf in flatten(looped).items()}
    rows = [Row((name,), (name,), keep()) for name in shapes]
    checked = apply_rows(rows, {name: array.astype(np.float32) for name, array in arrays.items()}, shapes)
    nested = unflatten(checked)
    return jax.tree.map(np.asarray, stack_layers(jax.tree.map(jnp.asarray, nested)) if scan else nested)


def cast(arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    """The arrays in one of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f'--dtype={dtype} is none of {", ".join(DTYPES)}.')
    return {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}


# -- Whether another library has the same model --

# How a model is computed and trained is not told by others, or not by the same name.
NOT_COMPARED = ('compute', 'drop_path', 'inpainting_positions', 'name', 'parent')


def difference(ours: Any, theirs: Any, where: str = 'model') -> str:
    """The first setting in which two modules differ, or ''."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name not in NOT_COMPARED:
                found = difference(getattr(ours, field.name), getattr(theirs, field.name), f'{where}.{field.name}')
                if found:
                    return found
        return ''
    if where == 'model.num_classes':  # What a head is called is not told.
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and set(ours) == set(theirs):
        return next(filter(None, (difference(ours[name], theirs[name], f'{where}.{name}') for name in ours)), '')
    return '' if ours == theirs else f'{where} is {ours!r}, and there it is {theirs!r}'


# -- How clips come to it, for people and for those who rebuild it --


def describe_preprocessing(trained: Trained) -> dict[str, Any]:
    """preprocessing.json: modality -> what is cut out of a clip, and what becomes of it."""
    view, preprocess = trained.view, trained.preprocess
    found: dict[str, Any] = {}
    for modality in trained.modalities:
        part = dataclasses.asdict(view.parts[modality])
        part.pop('crop', None)  # Of training.
        if modality == 'audio':
            part |= {
                'convention': preprocess.convention,
                'sample_rate': preprocess.sample_rate,
                'num_mel_bins': preprocess.num_mel_bins,
                'num_spec_frames': preprocess.num_spec_frames,
                'mean': preprocess.audio_mean,
                'std': preprocess.audio_std,
            }
            if preprocess.convention != STORED:
                part['log_mel'] = dataclasses.asdict(preprocess.log_mel_convention)
        else:
            part |= {'rgb_mean': list(preprocess.rgb_mean), 'rgb_std': list(preprocess.rgb_std)}
        found[modality] = part
    return json.loads(json.dumps(found))


VIEWS = {'video': VideoView, 'audio': AudioView, 'image': ImageView}
# Name in preprocessing.json -> that of `Preprocess`.
FIELDS = {
    'audio': {
        'mean': 'audio_mean', 'std': 'audio_std',
        **{name: name for name in ('convention', 'sample_rate', 'num_mel_bins', 'num_spec_frames')},
    },
    **{picture: {name: name for name in ('rgb_mean', 'rgb_std')} for picture in ('video', 'image')},
}  # fmt: skip


def rebuild_preprocessing(described: Mapping[str, Any]) -> tuple[View, Preprocess]:
    """Undoes `describe_preprocessing`; a ValueError names what is missing, or of another kind than it should be."""
    parts: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for modality, part in described.items():
        if modality not in VIEWS or not isinstance(part, Mapping):
            raise ValueError(f'{modality} is {part!r:.80}, where a table for one of {", ".join(VIEWS)} was due.')
        view, names = kinds_of(VIEWS[modality]), FIELDS[modality]
        whole = kinds_of(Preprocess)
        kinds = {**view, **{name: whole[field] for name, field in names.items()}}
        missing = [name for name in kinds if name not in part and name != 'crop']
        if missing:
            raise ValueError(f'{modality} has no {missing[0]!r}.')
        check_kinds(modality, part, kinds)
        parts[modality] = VIEWS[modality](**{name: part[name] for name in view if name in part})
        fields |= {field: part[name] for name, field in names.items()}
    fields |= {name: tuple(fields[name]) for name in ('rgb_mean', 'rgb_std') if name in fields}
    preprocess = Preprocess(flip=False, **fields)
    if 'audio' in described and preprocess.convention != STORED:
        known = json.loads(json.dumps(dataclasses.asdict(preprocess.log_mel_convention)))
        if known != described['audio'].get('log_mel'):
            raise ValueError(
                f'log-mels of the convention {preprocess.convention!r} were others when this was exported: use the '
                'version of avmae_jax that its README.md names.'
            )
    return View(**parts), preprocess
