"""Memory, time and money, on numbers that were worked out by hand."""

import dataclasses
import json
import math
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
        ('v5f:4x4', "^--topology='v5f' is none of v4, .* did you mean v5"),
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


def test_a_slice_may_be_less_than_a_host(monkeypatch):
    # Told so, the compiler takes it; without, it says that a v5e:1x1 is not divisible by 2x2x1.
    monkeypatch.setattr(topology_lib.importlib.util, 'find_spec', lambda name: True)
    monkeypatch.setattr(topology_lib, 'LIBTPU_SETTINGS', {})
    given = lambda name: topology_lib._describe_tpu(name, *topology_lib.parse(name), num_slices=1)  # noqa: E731
    asked = {name: given(name).get('chips_per_host_bounds') for name in ('v5e:1x1', 'v5e:2x2', 'v5p:1x1x1')}
    assert asked == {'v5e:1x1': (1, 1, 1), 'v5e:2x2': None, 'v5p:1x1x1': (1, 1, 1)}
    assert grid('v5e:1x1').host_threads * 4 == grid('v5e:2x2').host_threads == grid('v5e:4x4').host_threads


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
    return hlo.Collective(kind, 'f32', size, times, tuple(range(group)), overlapped, '', 0)


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
    assert estimate.wanted_bytes('RESOURCE_EXHAUSTED: out of memory...Try less') == math.inf
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


@pytest.mark.parametrize('island, data', [(2, 2), (3, 3), (6, 6), (7, 7), (8, 8), (12, 4)])
def test_a_state_is_split_over_any_number_of_chips(island, data):
    found = list(search.meshes(2 * island, 2, RULES))
    assert ('fsdp', {'replica': 2 * island // data, 'data': data, 'model': 1}) in found


class Machine:
    """Stands in for the compiler: a state of 80, activations of 100, a limit; computing once more saves traffic."""

    def __init__(self, limit: float, traffic: float):
        self.limit, self.traffic, self.compiled = limit, traffic, []
        spread = search.meshes(64, 2, RULES)
        self.ways = list(search.layouts(spread, batch_size=512))

    def state(self, layout) -> float:
        split = {'replicated': 1, 'fsdp': layout.mesh['data'], 'both': layout.mesh['data'] * layout.mesh['model']}
        return 80 / split[layout.rules]

    def bound(self, layout) -> tuple[float, float]:
        return self.state(layout), 4 / 3 if layout.remat == 'full' else 1.0

    def peak(self, layout) -> float:
        return self.state(layout) + 100 * {'none': 1, 'dots': 0.5, 'full': 0.2}[layout.remat] / layout.accumulate_steps

    def seconds(self, layout) -> float:
        moved = self.traffic * {'none': 1, 'dots': 0.9, 'full': 0.7}[layout.remat]
        sent = {'replicated': 0.1, 'fsdp': 0.2 * layout.accumulate_steps, 'both': 0.9 * layout.mesh['model']}
        return max(self.bound(layout)[1], moved) + sent[layout.rules]

    def compile(self, layout) -> result.Plan:
        self.compiled.append(layout)
        made = plan(layout, self.seconds(layout), 0)
        peak = self.peak(layout)
        fits = dict(parameters=0, optimizer=0, batch=0, code=0, temporary=int(peak))
        found = memory(**(fits if peak <= self.limit else dict(temporary=None, wanted=peak)), limit=self.limit)
        return dataclasses.replace(made, memory=found)

    def search(self, max_compiles: int) -> list[result.Plan]:
        return search.search(
            self.ways,
            bound=self.bound,
            compile_layout=self.compile,
            memory_limit=self.limit,
            max_compiles=max_compiles,
        )


@pytest.mark.parametrize('traffic', [0.5, 3.0], ids=['computing is the limit', 'memory is the limit'])
@pytest.mark.parametrize('limit', [500, 110, 42, 12, 2])
def test_the_search_ends_with_the_best_of_all_and_compiles_few_of_them(limit, traffic):
    machine = Machine(limit, traffic)
    every = [layout for way in machine.ways for layout in way]
    fitting = [machine.seconds(layout) for layout in every if machine.peak(layout) <= limit]
    found = machine.search(max_compiles=1000)
    assert len(machine.compiled) == len(found) < len(every) / 2
    assert len({str(each) for each in machine.compiled}) == len(found)
    if not fitting:
        return
    assert found[0].memory.fits and found[0].time.step == min(fitting)
    assert [each.memory.fits for each in found] == sorted((each.memory.fits for each in found), reverse=True)
    few = machine.search(max_compiles=12)
    assert len(few) <= 12 and few[0].memory.fits and few[0].time.step <= 1.3 * min(fitting)


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


def test_what_does_not_compile_comes_last_and_says_why():
    layout = result.Layout({'replica': 1, 'data': 16, 'model': 1}, 'replicated', 1, 'none')
    bare = dict(time=None, run=None, collectives=None, memory=memory(temporary=None))
    failed = dataclasses.replace(plan(layout, 1.0, 1), **bare, failure='JaxRuntimeError: INTERNAL: of no use')
    too_much = dataclasses.replace(failed, failure=None, memory=memory(temporary=None, wanted=1e12))
    slow_and_too_much = plan(layout, 1e13, 10**9)  # For GPUs it is compiled all the same.
    ranked = result.ranking([failed, too_much, slow_and_too_much, plan(layout, 1.0, 1)]).splitlines()[2:]
    endings = ('compute', 'does not fit', 'does not fit', 'does not compile')
    assert [row.endswith(ending) for row, ending in zip(ranked, endings, strict=True)] == [True] * 4
    assert '0.93 GiB' in ranked[1] and '931.32 GiB' in ranked[2]
    assert 'does not compile: JaxRuntimeError' in result.text(failed)
    assert json.loads(json.dumps(failed.to_json(), allow_nan=False))['memory']['peak'] is None
    assert result.picture(failed).shape[1] == result.WIDTH


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
