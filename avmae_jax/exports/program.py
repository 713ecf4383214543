"""Programs that run without this package: StableHLO with the parameters in it, by `jax.export`.

    program = jax.export.deserialize(pathlib.Path('embed.stablehlo').read_bytes())
    program.call({'video': frames, 'audio': waveform})      # modality -> [b d]; any number of clips

From frames and samples of the shapes that README.md tells, uint8 and float32, to features (embed) and, of a classifier,
to logits (classify); for CPUs, CUDA and TPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import export

from avmae_jax.exports import native
from avmae_jax.exports.functions import FUNCTIONS
from avmae_jax.exports.trained import DTYPES, Trained
from avmae_jax.structs import Modality

PLATFORMS = ('cpu', 'cuda', 'tpu')
SUFFIX = '.stablehlo'


def write(folder: epath.Path, trained: Trained, dtype: str) -> None:
    """One file a function, and the description of the model beside them."""
    if importlib.util.find_spec('flatbuffers') is None:
        raise ValueError("--format=jax_export needs flatbuffers: pip install 'avmae_jax[export]'.")
    for name in ('embed', 'classify') if trained.heads else ('embed',):
        (folder / f'{name}{SUFFIX}').write_bytes(export_function(trained, name, dtype))
    native.write_description(folder, trained)


def export_function(trained: Trained, name: str, dtype: str) -> bytes:
    """A function of `functions.FUNCTIONS` with the parameters in it; outputs are those of the model itself."""
    trained = trained._replace(model=_portable(trained.model))
    stored = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), trained.params)

    def call(rows: dict[Modality, Any]) -> dict[str, Any]:
        params = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), stored)
        return FUNCTIONS[name](trained, params, rows)

    exported = export.export(jax.jit(call), platforms=PLATFORMS)(abstract_rows(trained))
    return bytes(exported.serialize())


def abstract_rows(trained: Trained) -> dict[Modality, jax.ShapeDtypeStruct]:
    """Any number of rows."""
    (b,) = export.symbolic_shape('b')
    dtypes = {'video': jnp.uint8, 'image': jnp.uint8, 'audio': jnp.float32}
    return {m: jax.ShapeDtypeStruct((b, *shape), dtypes[m]) for m, shape in trained.row_shapes.items()}


def _portable(model: Any) -> Any:
    """The model without kernels of one kind of device."""
    compute = dataclasses.replace(model.encoder.compute, attention='xla', remat='none')
    return model.clone(encoder=model.encoder.clone(compute=compute))
