import jax
import jax.numpy as jnp
import numpy as np
import optax

from avmae_jax.models.blocks import Compute, Stack
from avmae_jax.models.sizes import Size
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.training import state as state_lib

SIZE = Size(width=64, num_heads=2, mlp_width=256, num_layers=4)


def make_init(optimizer=None):
    stack, x = Stack(SIZE, Compute('float32')), jnp.zeros((1, 1, SIZE.width))
    return state_lib.make_init(lambda key: stack.init(key, x)['params'], lambda _: None, optimizer or optax.adam(0.1))


def test_the_state_comes_into_being_in_parts_and_no_device_ever_holds_the_whole():
    init = make_init()
    shardings = rules.state_shardings(state_lib.abstract_state(init), mesh_lib.make_mesh(), 'fsdp', min_elements=64)
    compiled = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile()
    whole = sum(x.size * 4 for x in jax.tree.leaves(state_lib.abstract_state(init)._replace(rng=None)))
    memory = compiled.memory_analysis()  # Of one device.
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 4


def test_what_is_drawn_does_not_depend_on_where_it_is_drawn():
    init, seen = make_init(optax.sgd(0.1)), []
    for sizes, rule_set in ((dict(data=1), 'replicated'), (dict(replica=2, data=2, model=2), 'fsdp_tensor')):
        mesh = mesh_lib.make_mesh(**sizes, devices=jax.devices()[: 1 if rule_set == 'replicated' else 8])
        shardings = rules.state_shardings(state_lib.abstract_state(init), mesh, rule_set, min_elements=1)
        seen.append(state_lib.init_sharded(init, jax.random.key(0), shardings).params)
    jax.tree.map(np.testing.assert_array_equal, *seen)
