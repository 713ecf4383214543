import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from avmae_jax.ops.dims import constrain
from avmae_jax.parallel import hosts, mesh, rules


def test_one_size_of_the_mesh_may_be_left_open():
    assert dict(mesh.make_mesh().shape) == {'replica': 1, 'data': 8, 'model': 1}
    assert dict(mesh.make_mesh(replica=2, data=-1).shape) == {'replica': 2, 'data': 4, 'model': 1}
    for sizes in (dict(replica=3), dict(replica=-1, data=-1), dict(data=4), dict(data=0)):
        with pytest.raises(ValueError, match='parallel.'):
            mesh.make_mesh(**sizes)


def test_fsdp_splits_the_widest_dimension_that_divides_and_keeps_small_parameters_whole():
    grid = mesh.make_mesh()
    fsdp = rules.RULES['fsdp']
    assert rules.partition_spec('encoder/mlp/up/kernel', (64, 512), fsdp, grid) == P(None, 'data')
    assert rules.partition_spec('encoder/mlp/up/kernel', (64, 511), fsdp, grid, min_elements=1) == P('data')
    assert rules.partition_spec('encoder/mlp/up/kernel', (63, 511), fsdp, grid, min_elements=1) == P()
    assert rules.partition_spec('encoder/mlp/up/bias', (512,), fsdp, grid) == P()
    # A scanned stack has its layers in front; they are never split.
    assert rules.partition_spec('encoder/mlp/up/kernel', (24, 64, 512), fsdp, grid) == P(None, None, 'data')
    # Each layer is gathered by itself, so that what is too small to be split is so however many layers there are.
    assert rules.partition_spec('encoder/mlp/up/bias', (64, 512), fsdp, grid) == P()


def test_replicated_splits_nothing():
    grid = mesh.make_mesh()
    assert rules.partition_spec('encoder/mlp/up/kernel', (64, 4096), rules.RULES['replicated'], grid) == P()
    with pytest.raises(ValueError, match='fsdp'):
        rules.state_shardings({}, grid, 'fdsp')


def test_tensor_splits_heads_and_the_middle_of_the_mlp_alone():
    grid, tensor = mesh.make_mesh(data=2, model=4), rules.RULES['tensor']
    assert rules.partition_spec('attention/qkv/kernel', (4, 64, 768), tensor, grid) == P(None, None, 'model')
    assert rules.partition_spec('attention/out/kernel', (128, 128), tensor, grid) == P('model')
    assert rules.partition_spec('mlp/up/kernel', (64, 512), tensor, grid) == P(None, 'model')
    assert rules.partition_spec('mlp/down/kernel', (512, 64), tensor, grid) == P('model')
    assert rules.partition_spec('decoder/output_video/kernel', (64, 1536), tensor, grid) == P()


def test_fsdp_and_tensor_together_split_a_kernel_along_both_of_its_dimensions():
    grid, both = mesh.make_mesh(data=2, model=4), rules.RULES['fsdp_tensor']
    assert rules.partition_spec('attention/qkv/kernel', (64, 512), both, grid) == P('data', 'model')
    assert rules.partition_spec('mlp/down/kernel', (512, 64), both, grid) == P('model', 'data')
    assert rules.partition_spec('decoder/output_video/kernel', (64, 1536), both, grid) == P(None, 'data')


def test_with_replicas_fsdp_is_hybrid_split_within_each_and_whole_in_all():
    grid = mesh.make_mesh(replica=2)
    shardings = rules.state_shardings({'mlp': {'up': {'kernel': jnp.zeros((64, 512))}}}, grid, 'fsdp')
    kernel = shardings['mlp']['up']['kernel']
    assert kernel.spec == P(None, 'data') and kernel.shard_shape((64, 512)) == (64, 512 // 4)
    assert rules.batch_sharding(grid).shard_shape((16, 3)) == (2, 3)


def test_a_mesh_that_divides_little_of_the_state_is_told(caplog):
    state = {'mlp': {'up': {'kernel': jnp.zeros((66, 510))}}, 'mask_token': jnp.zeros(64)}
    with caplog.at_level('WARNING'):
        rules.state_shardings(state, mesh.make_mesh(), 'fsdp')
    assert 'mlp/up/kernel (66, 510)' in caplog.text and "multiple of {'data': 8}" in caplog.text
    caplog.clear()
    with caplog.at_level('WARNING'):
        rules.state_shardings(state, mesh.make_mesh(data=2, model=4), 'fsdp')
    assert not caplog.text


def test_activations_lie_on_the_mesh_by_the_names_of_their_dimensions():
    grid = mesh.make_mesh(replica=2, data=2, model=2)

    def split(first, last, shape):
        place = jax.jit(rules.on_mesh(lambda x: constrain(x, first, last), grid), in_shardings=NamedSharding(grid, P()))
        return place(jnp.zeros(shape)).sharding.spec

    assert split('batch', 'heads', (8, 3, 4)) == P(('replica', 'data'), None, 'model')
    assert split('batch', 'width', (8, 3, 4)) == P(('replica', 'data'))
    assert split('batch', 'mlp', (8, 4)) == P(('replica', 'data'), 'model')
    assert split('batch', 'mlp', (6, 3)) == P()  # What does not divide stays whole.


def test_a_function_that_was_compiled_without_a_mesh_is_compiled_anew_with_one():
    whole = NamedSharding(mesh.make_mesh(replica=2), P())
    inner, x = jax.jit(lambda x: constrain(x, 'batch')), jax.device_put(jnp.zeros(8), whole)
    assert inner(x).sharding.spec == P()
    assert jax.jit(rules.on_mesh(lambda x: inner(x), whole.mesh))(x).sharding.spec == P(('replica', 'data'))


def test_moments_lie_where_their_parameters_lie():
    state = {
        'params': {'mlp': {'up': {'kernel': jnp.zeros((64, 512))}}},
        'opt_state': ({'mu': {'mlp': {'up': {'kernel': jnp.zeros((64, 512))}}}, 'count': jnp.zeros([])},),
    }
    shardings = rules.state_shardings(state, mesh.make_mesh(), 'fsdp')
    kernel = shardings['params']['mlp']['up']['kernel']
    assert kernel.spec == P(None, 'data')
    assert shardings['opt_state'][0]['mu']['mlp']['up']['kernel'] == kernel
    assert shardings['opt_state'][0]['count'].spec == P()


def _rows(count):
    for i in range(count):
        yield {'x': np.full((8, 2), i, np.float32)}


def test_prefetch_gives_every_batch_once_and_in_order():
    batches = hosts.Prefetch(_rows(5), rules.batch_sharding(mesh.make_mesh()))
    seen = list(batches)
    batches.close()
    assert [int(rows['x'][0, 0]) for rows, _ in seen] == list(range(5))
    for rows, batch in seen:
        np.testing.assert_array_equal(batch['x'], rows['x'])
        assert batch['x'].addressable_shards[0].data.shape == (1, 2)


def test_what_stops_the_stream_is_raised_where_the_batch_was_wanted():
    def broken():
        yield from _rows(1)
        raise ValueError('too many damaged records')

    batches = hosts.Prefetch(broken(), rules.batch_sharding(mesh.make_mesh()))
    next(batches)
    with pytest.raises(ValueError, match='damaged'):
        next(batches)
    batches.close()


def test_waiting_counts_only_while_the_device_has_nothing_to_do():
    import time

    def slow():
        for rows in _rows(4):
            time.sleep(0.1)
            yield rows

    def waited(busy):
        batches = hosts.Prefetch(slow(), rules.batch_sharding(mesh.make_mesh()))
        batches.busy_while(lambda: busy)
        list(batches)
        batches.close()
        return batches.wait_seconds

    assert waited(busy=True) == 0
    assert waited(busy=False) > 0.2


def test_a_prefetch_that_is_closed_early_does_not_hang():
    batches = hosts.Prefetch(_rows(1000), rules.batch_sharding(mesh.make_mesh()))
    next(batches)
    batches.close()
    assert not batches._thread.is_alive()
    assert jax.process_count() == 1


def test_slices_are_of_tpus_and_hosts_with_gpus_are_none():
    devices = {
        kind: [types.SimpleNamespace(platform=kind, slice_index=i // 4) for i in range(8)] for kind in ('tpu', 'gpu')
    }
    assert mesh.split_slices(devices['tpu']) == [devices['tpu'][:4], devices['tpu'][4:]]
    assert mesh.split_slices(devices['gpu']) == [devices['gpu']]
    assert mesh.split_slices(jax.devices()) == [jax.devices()]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that is not there, as jax describes one: two by two of them have a host."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int
    platform: str = 'tpu'
    core_on_chip: int = 0


def chips_of(kind: str, shape: tuple[int, int, int], num_slices: int) -> list[Chip]:
    columns, rows, layers = shape
    places = [(x, y, z) for z in range(layers) for y in range(rows) for x in range(columns)]
    hosts = [(x // 2 + columns // 2 * (y // 2 + rows // 2 * z)) for x, y, z in places]
    num_hosts = max(hosts) + 1
    return [
        Chip(index * len(places) + i, kind, place, index * num_hosts + hosts[i], index)
        for index in range(num_slices)
        for i, place in enumerate(places)
    ]


@pytest.mark.parametrize(
    'kind, shape, num_slices',
    [
        ('TPU v4', (4, 4, 4), 1),
        ('TPU v5 lite', (4, 4, 1), 1),
        ('TPU v5 lite', (8, 8, 1), 2),
        ('TPU v5', (4, 4, 4), 2),
        ('TPU v6 lite', (8, 8, 1), 1),
    ],
)
def test_every_split_of_a_slice_has_a_mesh_whose_layers_lie_within_hosts(kind, shape, num_slices):
    chips = chips_of(kind, shape, num_slices)
    for replica, model in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        if replica % num_slices or len(chips) % (replica * model):
            continue
        grid = mesh.make_mesh(replica, -1, model, chips).devices
        assert grid.shape == (replica, len(chips) // replica // model, model)
        assert sorted(chip.id for chip in grid.flat) == list(range(len(chips)))
        assert mesh.layers_within_processes(grid)
        # Slices are crossed by replica alone.
        assert all(len({chip.slice_index for chip in group.flat}) == 1 for group in grid)
