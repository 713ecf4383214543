import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute, Stack, stack_layers
from avmae_jax.models.sizes import Size
from avmae_jax.structs import Batch
from avmae_jax.training import nonfinite
from avmae_jax.training.state import TrainState


class Model(nn.Module):
    """Two modules of which one may be at fault."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='decoder')(nn.Dense(4, name='encoder')(x))


class Objective:
    def __call__(self, model, params, teacher, inputs, batch, rng):
        outputs = model.apply({'params': params}, inputs['audio'])
        return jnp.mean(jnp.square(outputs)), types.SimpleNamespace(losses={'squares/audio': jnp.mean(outputs)})


def _batch(audio):
    rows = len(audio)
    return Batch(
        media={'audio': audio},
        present={'audio': np.ones(rows, bool)},
        labels={},
        record=np.arange(rows, dtype=np.int32) + 10,
        seed=np.zeros((rows, 2), np.uint32),
        weight=np.ones(rows, np.float32),
        damaged=np.zeros(rows, np.int32),
    )


@pytest.fixture
def batch():
    return _batch(np.ones((4, 3), np.float32))


@pytest.fixture
def state():
    params = Model().init(jax.random.key(0), jnp.ones((1, 3)))['params']
    return TrainState(jnp.int32(7), params, None, None, jax.random.key(1))


def _diagnose(state, batch, model=None):
    return nonfinite.diagnose(
        model=model or Model(),
        objective=Objective(),
        preprocess=lambda rows, train: rows.media,
        state=state,
        batch=batch,
    )


def test_nothing_is_found_where_all_is_well(state, batch):
    diagnosis = _diagnose(state, batch)
    assert 'nothing' in diagnosis.first_fault()
    assert [name for name, _ in diagnosis.activations] == ['encoder', 'decoder', 'the model']


class StackModel(nn.Module):
    """Layers, of which one may be at fault, and a module behind them."""

    scan: bool

    @nn.compact
    def __call__(self, x):
        size = Size(width=4, num_heads=2, mlp_width=8, num_layers=3)
        x = Stack(size, Compute('float32', scan=self.scan), name='encoder')(x[:, None])
        return nn.Dense(2, name='decoder')(x)


@pytest.mark.parametrize('scan', [False, True], ids=['loop', 'scan'])
def test_the_layer_at_fault_is_named_whatever_was_traced_before(scan):
    audio = np.eye(4, dtype=np.float32)
    params = StackModel(False).init(jax.random.key(0), audio)['params']
    layer = params['encoder']['layer_1']['mlp']
    layer['down'] = jax.tree.map(lambda x: jnp.full_like(x, 1e37), layer['down'])
    layer['up'] = jax.tree.map(lambda x: jnp.full_like(x, 1e6), layer['up'])
    state = TrainState(jnp.int32(7), stack_layers(params) if scan else params, None, None, jax.random.key(1))
    for _ in range(2):
        diagnosis = _diagnose(state, _batch(audio), StackModel(scan))
        names = [name for name, _ in diagnosis.activations]
        assert names == [
            *(f'encoder/layer_{i}' for i in range(3)), 'encoder/norm', 'encoder', 'decoder', 'the model'
        ]  # fmt: skip
        assert diagnosis.first_fault() == 'the output of encoder/layer_1'


def test_rows_whose_input_is_at_fault_are_named(state):
    audio = np.ones((4, 3), np.float32)
    audio[2, 1] = np.nan
    diagnosis = _diagnose(state, _batch(audio))
    assert diagnosis.inputs == {'audio': [2]}
    assert 'audio of rows [2]' in diagnosis.first_fault()


def test_the_module_whose_parameters_are_at_fault_is_named(state, batch):
    state.params['decoder']['kernel'] = state.params['decoder']['kernel'].at[0, 0].set(jnp.nan)
    diagnosis = _diagnose(state, batch)
    assert diagnosis.first_fault() == 'the parameters of decoder'
    assert np.isfinite(diagnosis.param_norms['encoder']) and not np.isfinite(diagnosis.param_norms['decoder'])


def test_finite_parameters_with_an_output_that_is_not_are_found_at_the_first_such_module(state, batch):
    state.params['encoder']['kernel'] = jnp.full((3, 4), 1e18)
    state.params['decoder']['kernel'] = jnp.full((4, 2), 1e37)
    diagnosis = _diagnose(state, batch._replace(media={'audio': np.full((4, 3), 1e18, np.float32)}))
    assert diagnosis.first_fault() == 'the output of decoder'


def test_the_report_holds_what_is_needed_to_look_into_it(state, batch, tmp_path):
    diagnosis = _diagnose(state, batch)
    ids = [f'clip-{i}' for i in batch.record]
    message = nonfinite.report_nonfinite(tmp_path, step=7, diagnosis=diagnosis, rows=batch, clip_ids=ids)
    for words in ('step 7', 'clip-10', 'encoder', 'decoder', str(tmp_path)):
        assert words in message
    report = json.loads((tmp_path / 'report-0.json').read_text())
    assert report['clip_ids'] == ids and report['step'] == 7
    np.testing.assert_array_equal(np.load(tmp_path / 'batch-0.npz')['media/audio'], batch.media['audio'])
