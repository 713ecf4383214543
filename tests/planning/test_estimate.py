"""Memory, time and money, on numbers that were worked out by hand."""

import types

import jax
import numpy as np
import pytest

from avmae_jax.evaluation import drawing
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.planning import estimate, gpus, hlo, result, search
from avmae_jax.planning import topology as topology_lib
from avmae_jax.planning.chips import CHIPS


def grid(name: str, num_slices: int = 1) -> topology_lib.Topology:
    """A topology without a compiler."""
    chip, shape = topology_lib.parse(name)
    devices = tuple(
        types.SimpleNamespace(coords=(*reversed(place), 0)[:3], slice_index=i if num_slices > 1 else None)
        for i in range(num_slices)
        for place in np.ndindex(*reversed(shape))
    )
    return topology_lib.Topology(name, chip, shape, num_slices, devices)


# -- Topologies --


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('v5e', 'v5e:4x4'),
        ('v5e:4x4x4', '2 dimensions, not 3'),
        ('v5f:4x4', 'did you mean v5'),
        ('h200:16', 'h200:4x8'),
        ('h200:0x8', 'at least 1'),
    ],
)
def test_a_wrong_topology_is_told_with_a_right_one(name, words):
    with pytest.raises(ValueError, match=words):
        topology_lib.parse(name)


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology_lib.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'avmae_jax\[plan\]'"):
        topology_lib.describe('v5e:4x4')
    with pytest.raises(ValueError, match=r"pip install 'avmae_jax\[cuda\]'"):
        topology_lib.describe('h200:8')
    with pytest.raises(ValueError, match='--num_slices=2 is for TPUs'):
        topology_lib.describe('h200:8', num_slices=2)


def test_a_group_uses_the_links_along_the_dimensions_that_it_spans():
    pod, link = grid('v5e:16x16'), CHIPS['v5e'].link_bandwidth
    row, all_of_it = pod.devices[:16], pod.devices
    assert pod.reach(row) == (2 * link, pytest.approx(8e-6))  # A ring of 16: both ways, at most 8 hops.
    assert pod.reach(all_of_it) == (4 * link, pytest.approx(16e-6))
    assert pod.reach(row[:4]) == (link, pytest.approx(3e-6))  # A part of a row is a line.
    small = grid('v5e:4x4')
    assert small.reach(small.devices) == (2 * link, pytest.approx(6e-6))  # Four in a row are no ring.


def test_between_slices_the_network_decides():
    pods = grid('v5e:16x16', num_slices=2)
    assert len(pods.devices) == 512 and pods.num_hosts == 128 and pods.num_islands == 2
    assert pods.reach([pods.devices[0], pods.devices[256]])[0] == CHIPS['v5e'].network_bandwidth


def test_gpus_reach_those_of_their_host_over_a_switch_and_the_others_over_the_network():
    chip, shape = topology_lib.parse('h200:4x2')
    devices = tuple(types.SimpleNamespace(process_index=i // 2, slice_index=0) for i in range(8))
    cluster = topology_lib.Topology('h200:4x2', chip, shape, 1, devices)
    assert cluster.num_hosts == cluster.num_islands == 4 and topology_lib.parse('h200:8')[1] == (1, 8)
    assert cluster.reach(devices[:2])[0] == chip.link_bandwidth and not cluster.apart(devices[:2])
    assert cluster.reach(devices)[0] == chip.network_bandwidth and cluster.apart(devices)


@pytest.mark.skipif(not gpus.compiler_is_installed(), reason="needs the compiler: pip install 'avmae_jax[cuda]'")
def test_a_step_compiles_for_gpus_that_are_not_here():
    cluster = topology_lib.describe('h200:2x4')
    mesh = mesh_lib.make_mesh(replica=2, data=4, devices=cluster.devices)
    rows = rules.batch_sharding(mesh)
    assert [cluster.apart(group) for group in (cluster.devices[:4], cluster.devices)] == [False, True]
    compiled = (
        jax.jit(lambda x: x.sum(axis=0), in_shardings=rows, out_shardings=jax.NamedSharding(mesh, jax.P()))
        .lower(jax.ShapeDtypeStruct((16, 64), np.float32))
        .compile()
    )
    (summed,) = hlo.collectives(compiled.as_text())
    assert (summed.kind, summed.dtype, summed.array_bytes, len(summed.group)) == ('all-reduce', 'f32', 256, 8)


# -- Time --


def collective(kind: str, size: int, group: int, overlapped: bool = False, times: int = 1) -> hlo.Collective:
    return hlo.Collective(kind, 'f32', size, times, tuple(range(group)), overlapped, '')


def test_the_roofline_takes_the_slowest_of_what_hides_and_adds_what_does_not():
    pod = grid('v5e:16x16')
    found = [collective('all-gather', 1600, 16, overlapped=True, times=10), collective('all-reduce', 16_000_000, 16)]
    rows = estimate.traffic(found, pod.devices, pod)
    # 16 MB x 2 x 15/16 over 100 GB/s, and 8 hops.
    assert rows[0].kind == 'all-reduce' and rows[0].seconds == pytest.approx(0.3e-3 + 8e-6)
    assert (rows[1].times, rows[1].array_bytes, rows[1].wire_bytes) == (10, 16_000, 15_000)
    time = estimate.step_time(pod, flops=19.7e12, memory_bytes=8.19e9, rows=rows)
    assert (time.compute, time.memory) == (pytest.approx(0.1), pytest.approx(0.01))
    assert time.step == pytest.approx(0.1 + rows[0].seconds) and time.limit == 'compute'
    memory_bound = estimate.step_time(pod, flops=19.7e12, memory_bytes=819e9, rows=[])
    assert memory_bound.step == pytest.approx(1.0) and memory_bound.limit == 'memory'


def test_a_run_costs_its_steps_times_its_chips():
    pod = grid('v5e:4x4')
    run = estimate.whole_run(
        pod,
        step_seconds=0.5,
        batch_size=512,
        num_steps=7200,
        step_flops=0.25 * 0.5 * 16 * 197e12,
        clip_cpu_seconds=estimate.clip_cpu_seconds(16),
        price=1.5,
    )
    assert run.clips_per_second == 1024 and run.host_clips_per_second == 256
    assert run.host_cores == pytest.approx(256 * 7.18e-3)
    assert run.days == pytest.approx(1 / 24) and run.chip_hours == pytest.approx(16) and run.cost == pytest.approx(24)
    assert run.mfu == pytest.approx(0.25)


# -- Memory --


def test_a_device_holds_its_shard_of_what_is_split_and_all_of_what_is_not():
    mesh = mesh_lib.make_mesh()
    split = jax.ShapeDtypeStruct((16, 4), 'float32', sharding=jax.NamedSharding(mesh, jax.P('data')))
    whole = jax.ShapeDtypeStruct((16, 4), 'bfloat16', sharding=jax.NamedSharding(mesh, jax.P()))
    assert estimate.shard_bytes({'a': split}) == 2 * 4 * 4
    assert estimate.shard_bytes({'a': split, 'b': whole}) == 32 + 128


def memory(**changes) -> estimate.Memory:
    fields = dict(
        parameters=10, optimizer=20, teacher=0, batch=5, temporary=60, code=1, wanted=None, limit=100.0, donated=True
    )
    return estimate.Memory(**{**fields, **changes})


def test_a_state_that_is_not_donated_is_there_twice():
    assert memory().peak == 96 and memory().fits
    assert memory(donated=False).peak == 126 and not memory(donated=False).fits
    statistics = types.SimpleNamespace(temp_size_in_bytes=7, generated_code_size_in_bytes=3, alias_size_in_bytes=29)
    assert not estimate.compiled_memory(memory(), statistics).donated
    statistics.alias_size_in_bytes = 30
    assert estimate.compiled_memory(memory(), statistics).peak == 10 + 20 + 5 + 7 + 3


def test_the_compilers_complaint_says_how_much_is_wanted():
    told = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.83G of 15.75G hbm. Exceeded by 5.08G.'
    assert estimate.wanted_bytes(told) == pytest.approx(20.83 * 2**30)
    assert estimate.wanted_bytes('INVALID_ARGUMENT: 20.83G') is None


# -- The search --

RULES = {'replicated': {}, 'fsdp': {'width': 'data'}, 'both': {'width': 'data', 'heads': 'model'}}


def plan(layout: result.Layout, seconds: float, size: int) -> result.Plan:
    return result.Plan(
        title='test',
        topology=grid('v5e:4x4'),
        layout=layout,
        batch_size=64,
        num_steps=10,
        num_parameters=1000,
        clip_flops=1e9,
        chip_flops=1e9,
        memory=memory(temporary=size),
        compile_seconds=1.0,
        memory_bytes=100.0,
        collectives=(),
        gradient_bytes={},
        time=estimate.Time(seconds, 0.0, 0.0, 0.0),
        run=estimate.Run(1.0, 0.5, 1.0, 1.0, 1.0, 1.0, None),
    )


def test_meshes_use_every_chip_and_keep_shards_of_the_state_in_a_slice():
    found = list(search.meshes(32, 2, RULES))
    assert {name for name, _ in found} == set(RULES)
    for name, mesh in found:
        assert mesh['replica'] * mesh['data'] * mesh['model'] == 32
        assert mesh['data'] * mesh['model'] <= 16 and mesh['replica'] % 2 == 0
        assert mesh['model'] == 1 or name == 'both'
    assert ('fsdp', {'replica': 2, 'data': 16, 'model': 1}) in found
    assert len({str(each) for each in found}) == len(found)


def test_the_search_takes_the_first_layout_that_fits_and_compiles_nothing_that_cannot_be_better():
    ways = list(search.layouts(search.meshes(16, 1, {'replicated': {}, 'fsdp': RULES['fsdp']}), batch_size=64))
    assert all(way[0].accumulate_steps == 1 and way[0].remat == 'none' for way in ways)
    compiled = []

    def compile_layout(layout):
        compiled.append(layout)
        too_much = layout.rules == 'fsdp' and layout.remat == 'none' and layout.accumulate_steps == 1
        return plan(layout, seconds=2.0 if layout.rules == 'fsdp' else 3.0, size=1000 if too_much else 10)

    def bound(layout):
        if layout.rules == 'replicated':
            return 1000.0, 0.0  # The state alone is too much.
        return 10.0, 2.5 if layout.mesh['data'] == 4 else 1.0 if layout.mesh['data'] == 16 else 1.5

    plans = search.search(ways, bound=bound, compile_layout=compile_layout, memory_limit=100.0, max_compiles=9)
    # data 16: too much, then fits; data 8 may be faster and is tried; data 4 cannot be.
    assert [(each.mesh['data'], each.remat, each.accumulate_steps) for each in compiled][:2] == [
        (16, 'none', 1), (16, *_second(ways)),
    ]  # fmt: skip
    assert {each.mesh['data'] for each in compiled} == {16, 8} and len(compiled) == 4
    assert plans[0].memory.fits and not plans[-1].memory.fits
    assert len(search.search(ways, bound=bound, compile_layout=compile_layout, memory_limit=100.0, max_compiles=1)) == 1


def _second(ways):
    layout = ways[-1][1]
    return layout.remat, layout.accumulate_steps


def test_layouts_that_do_not_divide_the_batch_are_left_out():
    (way,) = search.layouts([('replicated', {'replica': 1, 'data': 16, 'model': 1})], batch_size=32)
    assert {each.accumulate_steps for each in way} == {1, 2}


# -- What is shown --


def test_a_plan_is_told_drawn_and_kept():
    fits = plan(result.Layout({'replica': 1, 'data': 16, 'model': 1}, 'fsdp', 1, 'none'), 2.0, 10)
    told = result.text(fits)
    for words in ('16 chips, 4 hosts', 'fsdp, data 16', 'at least 2000.0 ms', 'MFU 50 %', 'Assumed: '):
        assert words in told
    tree = fits.to_json()
    assert tree['topology']['chips'] == 16 and tree['time']['step'] == 2.0 and tree['memory']['fits']
    assert '--config.parallel.data=16' in fits.layout.flags()
    picture = result.picture(fits)
    assert picture.dtype == np.uint8 and (picture == np.array(drawing.LINE_COLOURS[0])).all(-1).any()


def test_a_plan_that_does_not_fit_says_what_would():
    layout = result.Layout({'replica': 1, 'data': 16, 'model': 1}, 'replicated', 1, 'none')
    too_much = result.Plan(
        **{
            **{name: getattr(plan(layout, 1.0, 1), name) for name in result.Plan.__dataclass_fields__},
            'memory': memory(temporary=None, wanted=2000.0 * 2**30),
            'time': None,
            'run': None,
            'collectives': None,
        }
    )
    assert 'does not fit: 2000.00 GiB' in result.text(too_much) and 'remat=full' in result.text(too_much)
    assert result.ranking([too_much, plan(layout, 1.0, 1)]).splitlines()[-1].endswith('does not fit')
    assert result.picture(too_much).shape[1] == result.WIDTH
