"""The compilers know the flags that we set: XLA's in jaxlib, the TPU's in libtpu, where it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch import flags
from launch.spec import TPUS, JobSpec


def run_jax(script: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', **variables}
    return subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True, timeout=200)


def test_xla_knows_the_flags_for_gpus():
    (ours,) = {flags.environment(JobSpec('c.py', 'x', accelerator=f'{kind}:8'))['XLA_FLAGS'] for kind in ('h100', 'l4')}
    # Flags are read when the first client is made; one that is not known ends the process.
    script = 'from jaxlib import xla_client; xla_client.make_cpu_client()'
    assert not run_jax(script, XLA_FLAGS=ours).returncode
    assert 'Unknown flag' in run_jax(script, XLA_FLAGS=f'--xla_gpu_no_such_flag=true {ours}').stderr


# Whether collectives run beside something else in the gradient of a sharded perceptron, compiled for 16 chips.
COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
name, options = sys.argv[1], {'chip_config_name': 'megacore'} if sys.argv[1].startswith('v4') else {}
devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
mesh = jax.make_mesh((16,), ('data',), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
weights, rows = jax.NamedSharding(mesh, jax.P(None, None, 'data', None)), jax.NamedSharding(mesh, jax.P('data'))

def layer(x, w):
    return jnp.tanh(x @ w[0].astype(x.dtype)) @ w[1].astype(x.dtype) + x, None

def loss(w, x):
    return (jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2).mean()

step = jax.jit(jax.grad(loss), in_shardings=(weights, rows), out_shardings=weights)
shapes = jax.ShapeDtypeStruct((4, 2, 1024, 1024), jnp.float32), jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
print('async-collective-start' in step.lower(*shapes).compile().as_text())
"""


@pytest.mark.slow  # Eight compilations of some seconds each.
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
@pytest.mark.parametrize('kind', TPUS)
def test_all_gathers_run_beside_matrix_products_on_every_tpu_and_where_not_by_default_the_flags_do_it(kind):
    topology = f'{kind}:4x4' if TPUS[kind].num_dims == 2 else f'{kind}:2x2x4'
    variables = {'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1', 'XLA_FLAGS': ''}

    def overlaps(arguments: str) -> str:
        done = run_jax(f'import sys; sys.argv[1:] = [{topology!r}]\n{COMPILE}', **variables, LIBTPU_INIT_ARGS=arguments)
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout.strip()

    ours = flags.LIBTPU_INIT_ARGS[kind]
    assert overlaps(ours) == 'True'
    if ours:
        assert overlaps('') == 'False', 'libtpu does so by itself: take the flags out'
