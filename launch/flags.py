"""Variables that a process of the job gets, for each chip, and why."""

from __future__ import annotations

from launch.spec import JobSpec

# Where parameters are sharded (fsdp), every layer begins with an all-gather. These two together have libtpu run it
# beside the matrix products of the layer before; either alone does nothing, and v5e does so by default. Seen in what
# libtpu 0.0.42 compiles for slices of 16 chips (tests/launch/test_flags.py); how much time it saves was not measured.
# MaxText sets them, with three more that changed nothing there: CF_FOR_ALL_GATHER in
# github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py.
OVERLAP_ALL_GATHER = '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_enable_async_all_gather=true'

LIBTPU_INIT_ARGS = {
    'v4': OVERLAP_ALL_GATHER,
    'v5e': '',
    'v5p': OVERLAP_ALL_GATHER,
    'v6e': OVERLAP_ALL_GATHER,
}

# Collectives beside computation; off unless asked for in XLA's debug_options_flags.cc, on in NVIDIA's images of jax
# (docs.nvidia.com/jax-toolbox/environment-variables).
XLA_FLAGS_GPU = '--xla_gpu_enable_latency_hiding_scheduler=true'

# The rest is for NCCL, cuDNN and cuBLAS, which take theirs besides jax; jax's own default is 0.75
# (docs.jax.dev/en/latest/gpu_memory_allocation.html).
GPU_MEMORY_FRACTION = '0.9'

ADDED_UP = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')  # The last of equal flags counts.


def environment(spec: JobSpec) -> dict[str, str]:
    """Variable -> value, those that the job asks for included."""
    node = spec.node
    variables = {
        # A retry reads what the first try compiled. docs.jax.dev/en/latest/persistent_compilation_cache.html
        'JAX_COMPILATION_CACHE_DIR': f'{spec.workdir.rstrip("/")}/compiled',
        'PYTHONUNBUFFERED': '1',  # A killed process has said everything.
    }
    if node.family == 'tpu':
        variables['LIBTPU_INIT_ARGS'] = LIBTPU_INIT_ARGS[node.kind]
    if node.family == 'gpu':
        variables['XLA_FLAGS'] = XLA_FLAGS_GPU
        variables['XLA_PYTHON_CLIENT_MEM_FRACTION'] = GPU_MEMORY_FRACTION
    if node.family == 'cpu':
        variables['JAX_PLATFORMS'] = 'cpu'
        variables['JAX_NUM_CPU_DEVICES'] = str(node.num_chips)
    variables = {name: value for name, value in variables.items() if value}
    for name, value in spec.environment:  # To nothing too, where that is asked for.
        variables[name] = f'{variables[name]} {value}' if name in ADDED_UP and name in variables else value
    return variables
