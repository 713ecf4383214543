import re
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax import experiment, settings
from avmae_jax.models.blocks import stack_layers, unstack_layers
from avmae_jax.parallel import hosts, rules
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.training import state as state_lib
from avmae_jax.training import step as step_lib

NUM_STEPS = 10


@pytest.fixture(scope='module')
def config(small_config):
    return small_config('encoder=early', batch_size=16)


@pytest.fixture(scope='module')
def source(config):
    return experiment.open_train_sources(config)


@pytest.fixture(scope='module')
def parts(config, source):
    return experiment.build(config, source)


@pytest.fixture(scope='module')
def rows(config, source):
    """Host rows of every step."""
    with experiment.build_train_stream(config, source, num_steps=NUM_STEPS) as stream:
        return list(stream)


class Run(NamedTuple):
    metrics: list[dict[str, float]]
    state: state_lib.TrainState
    train_step: Any  # Compiled.
    batches: list


class Way(NamedTuple):
    """A way to compute the same."""

    replica: int = 1
    data: int = 1
    model: int = 1
    rules: str = 'replicated'
    accumulate_steps: int = 1
    scan: bool = True
    remat: str = 'none'


@pytest.fixture(scope='module')
def run(config, source, parts, rows):
    """(way) -> Run, from the same parameters each time."""

    def run_way(way: Way, num_steps: int = NUM_STEPS) -> Run:
        num_devices = way.replica * way.data * way.model
        mesh = mesh_lib.make_mesh(way.replica, way.data, way.model, devices=jax.devices()[:num_devices])
        computed = settings.override(config, {'model.compute.scan': way.scan, 'model.compute.remat': way.remat})
        model = experiment.build(computed, source).model
        init_params = experiment.make_init_params(parts.model, parts.objective, parts.shapes)
        init = state_lib.make_init(
            init_params if way.scan else lambda key: unstack_layers(init_params(key)),
            parts.objective.init,
            parts.optimizer,
        )
        shardings = rules.state_shardings(state_lib.abstract_state(init), mesh, way.rules, min_elements=1)
        state = state_lib.init_sharded(init, jax.random.key(0), shardings)
        sharding = rules.batch_sharding(mesh)
        train_step = step_lib.make_train_step(
            step_lib.make_loss(model, parts.objective, parts.preprocess),
            objective=parts.objective,
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            accumulate_steps=way.accumulate_steps,
        )
        batches = [hosts.global_batch(batch, sharding) for batch in rows[:num_steps]]
        compiled = step_lib.jit_train_step(
            train_step, state=state, shardings=shardings, batch=batches[0], batch_sharding=sharding
        )
        metrics = []
        for step, batch in enumerate(batches):
            before = state
            state, found = compiled(state, batch, np.int32(step))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))  # Donated.
            metrics.append({name: float(value) for name, value in found.items()})
        return Run(metrics, state, compiled, batches)

    return run_way


@pytest.fixture(scope='module')
def on_one_device(run) -> Run:
    return run(Way())


# Every number of devices, every rule set, with and without accumulation, scan and rematerialisation. Those that are
# marked compile longest.
WAYS = {
    'fsdp 2 x tensor 2 x 2 replicas, accumulated, dots': Way(
        replica=2, data=2, model=2, rules='fsdp_tensor', accumulate_steps=2, remat='dots'
    ),
    'one device, accumulated, loop': Way(accumulate_steps=4, scan=False),
}
SLOW_WAYS = {
    'fsdp 2 x 2 replicas, full remat': Way(replica=2, data=2, rules='fsdp', remat='full'),
    'fsdp 2, accumulated': Way(data=2, rules='fsdp', accumulate_steps=2),
    'fsdp 8': Way(data=8, rules='fsdp'),
    'replicated 8, loop': Way(data=8, scan=False),
    'tensor 2 x 2, loop, dots': Way(data=2, model=2, rules='tensor', scan=False, remat='dots'),
    'tensor 2': Way(model=2, rules='tensor'),
    'one device, accumulated, loop, full remat': Way(accumulate_steps=4, scan=False, remat='full'),
}


@pytest.mark.parametrize(
    'way',
    [*WAYS.values(), *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS.values())],
    ids=[*WAYS, *SLOW_WAYS],
)
def test_ten_steps_have_the_same_losses_however_they_are_computed(run, on_one_device, way):
    other = run(way)
    for ours, expected in zip(other.metrics, on_one_device.metrics, strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=2e-6, abs=1e-7), name
    params = other.state.params if way.scan else stack_layers(other.state.params)
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(on_one_device.state.params), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    check_memory(other, way)
    check_traffic(other, way)


def check_memory(run: Run, way: Way) -> None:
    """Each device holds its part of the state, once: the new state lies where the old one was."""
    leaves = jax.tree.leaves(run.state._replace(rng=None))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    parts = way.data if way.rules.startswith('fsdp') else 1
    assert held < 1.1 * sum(leaf.nbytes for leaf in leaves) / parts
    assert run.train_step.memory_analysis().alias_size_in_bytes >= held


class Collective(NamedTuple):
    """An exchange between devices in a compiled program, which may be of several arrays at once."""

    kind: str
    shapes: list[tuple[int, ...]]


def collectives(compiled: Any) -> list[Collective]:
    pattern = r' = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
    return [
        Collective(
            kind, [tuple(int(n) for n in dims.split(',') if n) for dims in re.findall(r'\w\[([\d,]*)\]', result)]
        )
        for result, kind in re.findall(pattern, compiled.as_text())
    ]


def check_traffic(run: Run, way: Way) -> None:
    """What is sent are parameters and their gradients; of tokens only sums of tensor parallelism, over own rows."""
    found = collectives(run.train_step)
    assert bool(found) == (way.replica * way.data * way.model > 1)
    tokens = [(kind, shape) for kind, shapes in found for shape in shapes if len(shape) > 2]
    own_rows = 16 // (way.replica * way.data * way.accumulate_steps)
    assert {kind for kind, _ in tokens} == ({'all-reduce'} if way.model > 1 else set())
    assert {shape[0] for _, shape in tokens} <= {own_rows}
    kernels = [shape for kind, shapes in found for shape in shapes if kind == 'all-gather' and len(shape) == 2]
    assert bool(kernels) == way.rules.startswith('fsdp')
    if way.replica > 1 and way.model == 1:
        # Gradients are added up inside each replica first; what crosses is the part that each device keeps.
        reduced = {shape for kind, shapes in found for shape in shapes if kind == 'all-reduce'}
        assert {(16, 48), (16, 48 // way.data)} <= reduced


def test_the_first_update_has_rate_zero_and_the_next_have_not(on_one_device):
    assert on_one_device.metrics[0]['learning_rate'] == 0 and on_one_device.metrics[0]['update_norm'] == 0
    assert on_one_device.metrics[1]['update_norm'] > 0 and int(on_one_device.state.step) == NUM_STEPS


def _copy(state):
    return jax.tree.map(lambda x: x.copy(), state)


def test_after_a_step_that_is_not_finite_nothing_changes_any_more(on_one_device):
    state, train_step, batches = on_one_device.state, on_one_device.train_step, on_one_device.batches
    params = _copy(state.params)
    params['encoder']['joint']['norm']['scale'] = params['encoder']['joint']['norm']['scale'].at[0].set(jnp.nan)
    broken, metrics = train_step(_copy(state)._replace(params=params), batches[0], np.int32(NUM_STEPS))
    assert not metrics['finite'] and int(broken.step) == NUM_STEPS
    jax.tree.map(np.testing.assert_array_equal, broken.opt_state, state.opt_state)
    # A step that was dispatched before anybody knew: all is well with it, but it must not count.
    after, metrics = train_step(_copy(state), batches[1], np.int32(NUM_STEPS + 1))
    assert metrics['finite'] and int(after.step) == NUM_STEPS
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


class SumObjective:
    """A loss without chance, in which rows count alike."""

    def __call__(self, model, params, teacher, inputs, batch, rng):
        scores = jnp.einsum('bp,p->b', inputs['image'].reshape(len(inputs['image']), -1), params['kernel'])
        return jnp.mean(jnp.square(scores - 1)), types.SimpleNamespace(losses={})

    def update(self, teacher, params):
        return teacher


def test_gradients_accumulated_over_parts_are_those_of_the_whole_batch(parts):
    image = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype(np.float32)
    params = {'kernel': jnp.full((12,), 0.1)}
    state = state_lib.TrainState(jnp.int32(0), params, parts.optimizer.init(params), None, jax.random.key(0))
    loss = step_lib.make_loss(None, SumObjective(), lambda batch, train: batch)
    results = []
    for accumulate_steps in (1, 2, 4):
        train_step = step_lib.make_train_step(
            loss,
            objective=SumObjective(),
            optimizer=parts.optimizer,
            schedule=parts.schedule,
            accumulate_steps=accumulate_steps,
        )
        results.append(jax.jit(train_step)(state, {'image': image}, 0)[1])
    for metrics in results[1:]:
        for name in ('loss', 'grad_norm'):
            np.testing.assert_allclose(metrics[name], results[0][name], rtol=1e-6)


# -- Finetuning --


def test_rows_lose_a_modality_before_anything_else_sees_them(rows):
    seen = []

    def preprocess(batch, *, train):
        seen.append(batch)
        return dict(batch.media)

    def objective(model, params, teacher, inputs, batch, rng):
        seen.append(batch)
        return jnp.zeros(()), types.SimpleNamespace(losses={})

    for ratio in (0.0, 1.0):
        step_lib.make_loss(None, objective, preprocess, lose_modality_ratio=ratio)(None, None, rows[0], None)
    for batch in seen[:2]:
        assert batch is rows[0]
    for batch in seen[2:]:
        np.testing.assert_array_equal(batch.present['video'] != batch.present['audio'], True)
        assert not np.asarray(batch.media['video'])[~np.asarray(batch.present['video'])].any()


@pytest.mark.parametrize('arguments', ['probe=linear', 'probe=none'])
def test_a_linear_probe_moves_nothing_but_the_head(small_finetuning, arguments):
    config = small_finetuning(arguments, **{'model.compute.scan': True})
    source = experiment.open_train_sources(config)
    parts = experiment.build(config, source)
    loss = step_lib.make_loss(parts.model, parts.objective, parts.preprocess)
    train_step = step_lib.make_train_step(
        loss, objective=parts.objective, optimizer=parts.optimizer, schedule=parts.schedule
    )
    before = state = jax.jit(experiment.make_init(parts))(jax.random.key(0))
    with experiment.build_train_stream(config, source, num_steps=3) as stream:
        for step, batch in enumerate(stream):  # The first has learning rate 0; to the second the head says nothing.
            state, _ = jax.jit(train_step)(state, batch, np.int32(step))
    moved = {
        rules.path_name(path)
        for (path, old), new in zip(
            jax.tree.leaves_with_path(before.params), jax.tree.leaves(state.params), strict=True
        )
        if not np.array_equal(old, new)
    }
    head = {'head_label/kernel', 'head_label/bias'}
    assert moved == head if arguments == 'probe=linear' else moved > head


def test_the_largest_array_of_a_function_is_found_in_its_loops_and_gradients_too():
    def loss(x):
        _, squares = jax.lax.scan(lambda carry, row: (carry, jnp.outer(row, row).sum()), 0.0, x)
        return squares.sum() + jax.jit(lambda row: jnp.outer(jnp.sin(row[:7]), row))(x[0]).sum()

    traced = jax.jit(jax.grad(loss)).trace(jnp.ones((3, 50)))
    assert step_lib.largest_array(traced.jaxpr) == 50 * 50 * 4
    assert step_lib.largest_array(jax.jit(lambda x: x.astype(jnp.bfloat16)).trace(jnp.ones((3, 50))).jaxpr) == 300
