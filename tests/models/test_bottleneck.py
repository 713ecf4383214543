import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute, Stack, stack_layers, unstack_layers
from avmae_jax.models.bottleneck import FUSIONS, MBT
from avmae_jax.models.encoders import ENCODERS, MidEncoder
from avmae_jax.models.sizes import Size

LOOP, SCAN = Compute('float32', scan=False), Compute('float32', scan=True)
SIZE = Size(width=8, num_heads=2, mlp_width=16, num_layers=2)
RANDOM = np.random.default_rng(0)
TOKENS = {
    'video': RANDOM.normal(size=(2, 5, 8)).astype(np.float32),
    'audio': RANDOM.normal(size=(2, 3, 8)).astype(np.float32),
}
KINDS = [(fusion, shared) for fusion in FUSIONS for shared in (False, True)]


def build(fusion='bottleneck', shared=False, fusion_layer=1, compute=LOOP, **fields):
    return MBT(SIZE, compute, fusion_layer=fusion_layer, fusion=fusion, shared_weights=shared, **fields)


def make(model, tokens=TOKENS):
    """Parameters in which nothing is zero and no two streams are alike."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape) + 0.2, jnp.float32), shapes)


def run(model, params, tokens=TOKENS, **fields):
    return jax.jit(functools.partial(model.apply, **fields))({'params': params}, tokens)


def assert_same(a, b, tolerance=1e-5):
    assert set(a) == set(b)
    for m in a:
        np.testing.assert_allclose(a[m], b[m], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('fusion, shared', KINDS)
@pytest.mark.parametrize('fusion_layer', [0, 1, 2])
def test_streams_meet_from_the_fusion_layer_on_and_not_before(fusion, shared, fusion_layer):
    model = build(fusion, shared, fusion_layer)
    params = make(model)
    changed = {**TOKENS, 'audio': TOKENS['audio'][:, :, ::-1]}
    apply = jax.jit(lambda tokens: model.apply({'params': params}, tokens, mutable=['intermediates'])[1])
    one, two = (apply(tokens)['intermediates'] for tokens in (TOKENS, changed))
    # Through bottlenecks it takes a layer to hear of the other: one writes, then the other reads.
    first = fusion_layer + (fusion == 'bottleneck')
    for layer in range(2):
        video, audio = one[f'layer_{layer}']
        assert video.shape == (2, 5, 8) and audio.shape == (2, 3, 8)
        assert np.allclose(video, two[f'layer_{layer}'][0], atol=1e-6) == (layer < first)


@pytest.mark.parametrize('fusion, shared', KINDS)
def test_layers_in_a_loop_and_scanned_and_rematerialised_compute_the_same(fusion, shared):
    looped, scanned = build(fusion, shared), build(fusion, shared, compute=dataclasses.replace(SCAN, remat='full'))
    params = make(looped)
    rng = {'drop_path': jax.random.key(5)}

    def loss(model, params):
        model = model.clone(drop_path=0.5)
        return sum(jnp.square(x).sum() for x in run(model, params, train=True, rngs=rng).values())

    value, gradients = jax.jit(jax.value_and_grad(lambda p: loss(looped, p)))(params)
    fresh = jax.eval_shape(scanned.init, jax.random.key(0), TOKENS)['params']
    assert jax.tree.structure(fresh) == jax.tree.structure(stack_layers(params))
    again, same = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p)))(stack_layers(params))
    np.testing.assert_allclose(again, value, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, unstack_layers(same), gradients)


def test_one_stream_of_all_tokens_is_an_early_transformer():
    model = build('concatenation', shared=True, fusion_layer=0)
    params = make(model)
    layers = {**params['shared'], 'norm': params['norm']}
    joined = Stack(SIZE, LOOP).apply({'params': layers}, jnp.concatenate(list(TOKENS.values()), axis=1))
    assert_same(run(model, params), {'video': joined[:, :5], 'audio': joined[:, 5:]})


def test_streams_with_equal_weights_that_look_at_all_are_one_stream():
    one, two = build('concatenation', shared=True), build('concatenation')
    params = make(one)
    doubled = {'video': params['shared'], 'audio': params['shared'], 'norm': params['norm']}
    assert_same(run(one, params), run(two, doubled))


def test_bottlenecks_nobody_reads_leave_late_fusion():
    model = build(fusion_layer=0, test_with_bottlenecks=False)
    params = make(model)
    late = run(build(fusion_layer=2), params)
    assert_same(run(model, params), late)
    trained = run(model, params, train=True)
    assert_same(trained, run(build(fusion_layer=0), params))
    assert not np.allclose(trained['video'], late['video'], atol=1e-3)


@pytest.mark.parametrize('fusion, shared', KINDS)
def test_one_modality_alone_is_a_plain_transformer(fusion, shared):
    model, alone = build(fusion, shared, fusion_layer=0), {'audio': TOKENS['audio']}
    params = make(model, alone)
    assert set(params) == {'shared' if shared else 'audio', 'norm'}
    layers = {**params['shared' if shared else 'audio'], 'norm': params['norm']}
    plain = Stack(SIZE, LOOP).apply({'params': layers}, jnp.asarray(TOKENS['audio']))
    assert_same(run(model, params, alone), {'audio': plain})


def test_what_was_made_for_two_modalities_runs_on_one_and_still_uses_its_bottlenecks():
    model, alone = build(fusion_layer=0), {'audio': TOKENS['audio']}
    params = make(model)
    changed = {**params, 'bottlenecks': params['bottlenecks'][:, ::-1]}
    one, two = run(model, params, alone), run(model, changed, alone)
    assert set(one) == {'audio'} and not np.allclose(one['audio'], two['audio'], atol=1e-3)


@pytest.mark.parametrize('name', [*ENCODERS, 'mbt'])
def test_residuals_are_dropped_example_by_example_and_only_in_training(name):
    fields = {'fusion_layer': 1} if name in ('mid', 'mbt') else {}
    model = (MBT if name == 'mbt' else ENCODERS[name])(SIZE, LOOP, drop_path=0.5, **fields)
    params = make(model)
    still = run(model, params)
    assert_same(still, run(model.clone(drop_path=0.0), params, train=True))
    apply = jax.jit(lambda key: model.apply({'params': params}, TOKENS, True, rngs={'drop_path': key}))
    first, same, *others = (apply(jax.random.key(seed)) for seed in (0, 0, 1, 2, 3))
    assert_same(first, same)
    for row in (0, 1):
        assert not all(np.allclose(first['video'][row], other['video'][row], atol=1e-3) for other in others)
    with pytest.raises(Exception, match='drop_path'):
        model.apply({'params': params}, TOKENS, train=True)


def test_an_mbt_that_cannot_be_is_refused():
    for fields, message in (
        ({'fusion_layer': 3}, 'between 0 and num_layers=2'),
        ({'fusion_layer': -1}, 'got -1'),
        ({'fusion': 'sum'}, "fusion must be one of .*got 'sum'"),
        ({'num_bottlenecks': 0}, 'fusion_layer=2'),
        ({'drop_path': 1.0}, r'drop_path must lie in \[0, 1\)'),
    ):
        with pytest.raises(ValueError, match=message):
            build(**fields)


def test_joint_layers_of_mid_drop_as_often_as_their_depth_says():
    encoder = MidEncoder(Size(8, 2, 16, 5), LOOP, drop_path=0.4, fusion_layer=2)
    rates = [*encoder.stack('video', stop=2).drop_rates, *encoder.stack('joint', start=2).drop_rates]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
