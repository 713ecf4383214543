"""What attention on a TPU moves and keeps, by kernel and length: the TPU's compiler says, no TPU is needed.

    python benchmarks/attention_tpu.py                  # needs pip install 'avmae_jax[plan]'

One layer's attention, forward and backward, for 16 clips a chip in bfloat16. Prints a Markdown table: temporary memory,
and the bytes that the compiler expects to go to and from HBM.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from avmae_jax.evaluation.tables import format_markdown
from avmae_jax.ops import attention
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.planning import topology as topology_lib

CLIPS = 16
CASES = [(400, 8, 64), (800, 12, 64), (1568, 8, 64), (3136, 8, 64), (1568, 16, 80), (1568, 16, 88)]


def main() -> None:
    topology = topology_lib.describe('v5e:2x2')
    mesh = mesh_lib.make_mesh(devices=topology.devices)
    rows = rules.batch_sharding(mesh)
    table = [['tokens', 'heads', 'head width', 'kernel', 'temporary, MiB', 'HBM traffic, MiB']]
    for num_tokens, num_heads, head_width in CASES:
        shape = (CLIPS * mesh.size, num_tokens, num_heads, 3, head_width)
        for kernel in ('xla', 'splash'):

            def gradient(qkv, kernel=kernel):
                return jax.grad(lambda x: attention.self_attention(x, kernel).astype(jnp.float32).sum())(qkv)

            jitted = jax.jit(rules.on_mesh(gradient, mesh), in_shardings=rows, out_shardings=rows)
            compiled = jitted.lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
            moved = compiled.cost_analysis()['bytes accessed']
            table.append(
                [*map(str, (num_tokens, num_heads, head_width)), kernel]
                + [f'{size / 2**20:,.0f}' for size in (temporary, moved)]
            )
    print(format_markdown(table))


if __name__ == '__main__':
    main()
