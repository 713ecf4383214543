import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax import experiment
from avmae_jax.parallel import hosts, rules
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.training import state as state_lib
from avmae_jax.training import step as step_lib


@pytest.fixture(scope='module')
def config(small_config):
    return small_config('encoder=early')


@pytest.fixture(scope='module')
def source(config):
    return experiment.open_train_sources(config)


@pytest.fixture(scope='module')
def parts(config, source):
    return experiment.build(config, source)


@pytest.fixture(scope='module')
def rows(config, source):
    """Host rows of three steps."""
    with experiment.build_train_stream(config, source, num_steps=3) as stream:
        return list(stream)


class Run(NamedTuple):
    metrics: list[dict[str, float]]
    state: state_lib.TrainState
    train_step: Any  # Compiled.
    batches: list


def run(parts, rows, *, devices, rule_set) -> Run:
    """Some steps on a mesh of so many devices."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    init = experiment.make_init(parts)
    shardings = rules.state_shardings(state_lib.abstract_state(init), mesh, rule_set, min_elements=1)
    state = state_lib.init_sharded(init, jax.random.key(0), shardings)
    sharding = rules.batch_sharding(mesh)
    train_step = step_lib.make_train_step(
        step_lib.make_loss(parts.model, parts.objective, parts.preprocess),
        objective=parts.objective,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
    )
    batches = [hosts.global_batch(batch, sharding) for batch in rows]
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


@pytest.fixture(scope='module')
def on_one_device(parts, rows) -> Run:
    return run(parts, rows, devices=1, rule_set='replicated')


@pytest.mark.parametrize('rule_set', rules.RULES)
def test_eight_devices_compute_what_one_computes_under_every_rule_set(parts, rows, on_one_device, rule_set):
    eight = run(parts, rows, devices=8, rule_set=rule_set)
    for ours, expected in zip(eight.metrics, on_one_device.metrics, strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=1e-7), name
    pairs = zip(jax.tree.leaves(eight.state.params), jax.tree.leaves(on_one_device.state.params), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    split = [x for x in jax.tree.leaves(eight.state.opt_state) if not x.sharding.is_fully_replicated]
    assert bool(split) == (rule_set == 'fsdp')


def test_the_first_update_has_rate_zero_and_the_next_have_not(on_one_device):
    assert on_one_device.metrics[0]['learning_rate'] == 0 and on_one_device.metrics[0]['update_norm'] == 0
    assert on_one_device.metrics[1]['update_norm'] > 0 and int(on_one_device.state.step) == 3


def _copy(state):
    return jax.tree.map(lambda x: x.copy(), state)


def test_after_a_step_that_is_not_finite_nothing_changes_any_more(on_one_device):
    state, train_step, batches = on_one_device.state, on_one_device.train_step, on_one_device.batches
    params = _copy(state.params)
    params['encoder']['joint']['norm']['scale'] = params['encoder']['joint']['norm']['scale'].at[0].set(jnp.nan)
    broken, metrics = train_step(_copy(state)._replace(params=params), batches[0], np.int32(3))
    assert not metrics['finite'] and int(broken.step) == 3
    jax.tree.map(np.testing.assert_array_equal, broken.opt_state, state.opt_state)
    # A step that was dispatched before anybody knew: all is well with it, but it must not count.
    after, metrics = train_step(_copy(state), batches[1], np.int32(4))
    assert metrics['finite'] and int(after.step) == 3
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
