"""Joint layers of `mid` with norms of their own for a modality that is alone (CAV-MAE)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute, stack_layers, unstack_layers
from avmae_jax.models.encoders import MidEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.training.optimizer import layer_ids
from avmae_jax.weights.table import flatten

SIZE = Size(8, 2, 12, 4)
RANDOM = np.random.default_rng(0)
TOKENS = {m: RANDOM.normal(size=(2, n, 8)).astype(np.float32) for m, n in (('video', 3), ('audio', 4))}
ALONE = {'audio': TOKENS['audio']}


def encoder(scan=False, **fields):
    return MidEncoder(SIZE, Compute('float32', scan=scan), **{'fusion_layer': 2, 'modality_norms': True, **fields})


def randomised(model, tokens=TOKENS, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


def test_together_the_own_norms_are_not_used_and_alone_the_joint_ones_are_not():
    model = encoder()
    params = randomised(model)

    def loss(params, tokens):
        return sum(jnp.sum(x**2) for x in model.apply({'params': params}, tokens).values())

    for tokens, used, unused in [(TOKENS, 'joint/', 'joint_audio/'), (ALONE, 'joint_audio/', 'joint_video/')]:
        gradients = flatten(jax.grad(loss)(params, tokens))
        norms = {name: np.any(g) for name, g in gradients.items() if 'joint' in name and 'norm' in name}
        for name, moved in norms.items():
            assert moved == name.startswith(used), name
        assert any(name.startswith(unused) for name in norms)
        assert np.any(gradients['joint/layer_1/mlp/up/kernel'])


def test_with_the_numbers_of_the_joint_norms_a_modality_alone_is_what_it_is_without():
    model, plain = encoder(), encoder(modality_norms=False)
    params = randomised(model)
    shared = {name: part for name, part in params.items() if not name.startswith('joint_')}
    norms = {name: {k: v for k, v in part.items() if 'norm' in k} for name, part in shared['joint'].items()}
    norms['norm'] = shared['joint']['norm']
    same = {**shared, 'joint_audio': norms, 'joint_video': norms}
    ours, wanted = (m.apply({'params': p}, ALONE)['audio'] for m, p in ((model, same), (plain, shared)))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    assert not np.allclose(model.apply({'params': params}, ALONE)['audio'], wanted)


@pytest.mark.parametrize('tokens', [TOKENS, ALONE])
def test_scanned_and_looped_are_the_same(tokens):
    params = randomised(encoder())
    looped = encoder().apply({'params': params}, tokens)
    scanned = encoder(scan=True).apply({'params': stack_layers(params)}, tokens)
    assert jax.tree.all(jax.tree.map(np.array_equal, unstack_layers(stack_layers(params)), params))
    for m in tokens:
        np.testing.assert_allclose(looped[m], scanned[m], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_each_layer_of_a_modality_alone_is_sown(scan):
    model = encoder(scan)
    _, seen = model.apply({'params': randomised(model)}, ALONE, mutable=['intermediates'])
    flat = flatten(seen['intermediates'])
    assert sorted(flat) == ['audio/layer_0', 'audio/layer_1', 'layer_0', 'layer_1']
    assert all(value[0].shape == (2, 4, 8) for value in flat.values())


def test_residuals_of_a_modality_alone_are_dropped_in_training():
    model = encoder(drop_path=0.9)
    variables = {'params': randomised(model)}
    runs = [model.apply(variables, ALONE, train=True, rngs={'drop_path': jax.random.key(i)})['audio'] for i in range(4)]
    assert any(not np.allclose(runs[0], run) for run in runs[1:])


def test_without_a_norm_behind_the_streams_there_are_no_parameters_for_one():
    names = flatten(randomised(encoder(stream_norm=False)))
    assert not any(name.startswith(('audio/norm', 'video/norm')) for name in names)
    assert {'joint/norm/scale', 'joint_audio/norm/scale'} <= set(names)


@pytest.mark.parametrize('scan', [False, True])
def test_own_norms_count_as_the_layers_they_are_of(scan):
    ids = flatten(layer_ids({'encoder': randomised(encoder(scan))}))
    if scan:
        assert np.array_equal(ids['encoder/joint_audio/layers/mlp_norm/scale'], [3, 4])
    else:
        assert ids['encoder/joint_audio/layer_1/mlp_norm/scale'] == ids['encoder/joint/layer_1/mlp/up/kernel'] == 4
    assert ids['encoder/joint_audio/norm/scale'] == 5
