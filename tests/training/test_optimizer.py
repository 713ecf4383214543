import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avmae_jax.checkpoints import manager
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute, stack_layers, unstack_layers
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import ENCODERS
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.parallel import rules
from avmae_jax.structs import Mask
from avmae_jax.training import optimizer as optimizer_lib


def _schedules(reference):
    file = reference / 'optim' / 'lr_schedules.json'
    return json.loads(file.read_text()), np.load(file.with_suffix('.npz'))


def test_learning_rates_are_those_of_the_released_configs(reference):
    settings, arrays = _schedules(reference)
    assert settings
    for name, setting in settings.items():
        rates = setting['lr_configs']
        schedule = optimizer_lib.WarmupCosine(
            peak=rates['base_learning_rate'],
            num_steps=setting['total_steps'],
            warmup_steps=setting['warmup_steps'],
            end_ratio=rates.get('alpha', 0.0),
        )
        steps, expected = arrays[f'{name}/steps'], arrays[f'{name}/lr']
        # The reference jumps back to its peak behind the last step; see test_the_rate_stays_at_its_end.
        within = steps < setting['total_steps']
        ours = jax.vmap(schedule)(jnp.asarray(steps[within]))
        # Near the end 1 + cos() cancels in float32: an absolute error of 1e-7 of the peak.
        np.testing.assert_allclose(ours, expected[within], rtol=1e-5, atol=1e-7 * rates['base_learning_rate'])


def test_peak_rates_follow_from_the_base_rates_of_the_recipe(reference):
    settings, _ = _schedules(reference)
    for name, base in (('audioset_pretrain', 3e-4), ('vggsound_pretrain', 1.5e-4), ('imagenet_pretrain', 1.5e-4)):
        if name in settings:
            peak = optimizer_lib.peak_learning_rate(base, settings[name]['batch_size'])
            assert peak == pytest.approx(settings[name]['lr_configs']['base_learning_rate'])


def test_the_first_update_has_rate_zero_and_the_rate_stays_at_its_end():
    schedule = optimizer_lib.WarmupCosine(peak=1.0, num_steps=10, warmup_steps=2)
    assert schedule(0) == 0
    assert schedule(2) == 1
    assert schedule(10) == schedule(11) == schedule(1000) == 0


def _params():
    return {'dense': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full((3,), 2.0)}, 'mask_token': jnp.full((3,), 2.0)}


def test_decay_shrinks_kernels_alone_and_by_the_learning_rate():
    optimizer = optimizer_lib.adam(lambda step: 0.1, weight_decay=0.5)
    params = _params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new['dense']['kernel'], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(new['dense']['bias'], params['dense']['bias'])
    np.testing.assert_array_equal(new['mask_token'], params['mask_token'])


def test_clipping_leaves_small_gradients_alone_and_shortens_large_ones():
    def first_moment(clip_norm, scale):
        optimizer = optimizer_lib.adam(lambda step: 0.1, clip_norm=clip_norm)
        params = _params()
        grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), params)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.global_norm(optax.tree.get(state, 'mu')) / 0.1  # After one step mu is (1 - beta1) * gradient.

    small = optax.global_norm(jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), _params()))
    np.testing.assert_allclose(first_moment(1.0, 1e-3), small, rtol=1e-5)
    np.testing.assert_allclose(first_moment(1.0, 1e3), 1.0, rtol=1e-5)
    assert first_moment(None, 1e3) > 1000


# -- SGD and AdamW --


def _steps(optimizer, params, gradients):
    """The parameters after each of the gradients, and the last state."""
    state, seen = optimizer.init(params), []
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def _gradients(count, like):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), like) for _ in range(count)]


def test_sgd_adds_gradients_up_and_multiplies_the_sum_by_the_rate_of_the_step():
    rates = [0.0, 0.3, 0.1]
    params = {'w': jnp.ones(3)}
    gradients = _gradients(3, params)
    seen, _ = _steps(optimizer_lib.sgd(lambda step: jnp.asarray(rates)[step], momentum=0.9), params, gradients)
    trace, w = np.zeros(3), np.ones(3)
    for rate, grads, after in zip(rates, gradients, seen, strict=True):
        trace = np.asarray(grads['w']) + 0.9 * trace
        w = w - rate * trace
        np.testing.assert_allclose(after['w'], w, rtol=1e-5)


def test_adamw_decays_kernels_as_they_were_before_the_update():
    params = _params()
    gradients = _gradients(1, params)
    ours, _ = _steps(optimizer_lib.adamw(lambda step: 0.1, weight_decay=0.5), params, gradients)
    plain, _ = _steps(optimizer_lib.adamw(lambda step: 0.1, weight_decay=0.0), params, gradients)
    decayed = np.asarray(plain[0]['dense']['kernel']) - 0.1 * 0.5 * np.asarray(params['dense']['kernel'])
    np.testing.assert_allclose(ours[0]['dense']['kernel'], decayed, rtol=1e-6)
    np.testing.assert_array_equal(ours[0]['mask_token'], plain[0]['mask_token'])


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_every_optimizer_clips_by_the_norm_of_all_gradients(name):
    params = {'a': jnp.ones(4), 'b': jnp.ones(5)}
    (large,) = _gradients(1, params)
    norm = optax.global_norm(large)
    make = optimizer_lib.OPTIMIZERS[name]
    clipped, _ = _steps(make(lambda step: 0.1, clip_norm=0.25), params, [large, large])
    scaled = jax.tree.map(lambda x: x * 0.25 / norm, large)
    plain, _ = _steps(make(lambda step: 0.1), params, [scaled, scaled])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped[1], plain[1])


# -- The first moment in bfloat16 --


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_a_first_moment_in_bfloat16_takes_half_the_memory_and_changes_updates_by_its_rounding(name):
    make = optimizer_lib.OPTIMIZERS[name]
    params = {'kernel': jnp.ones((64, 8))}
    gradients = _gradients(20, params)
    exact, state = _steps(make(lambda step: 0.01), params, gradients)
    ours, smaller = _steps(make(lambda step: 0.01, first_moment_dtype='bfloat16'), params, gradients)
    moved = np.abs(exact[-1]['kernel'] - params['kernel']).mean()
    wrong = np.abs(ours[-1]['kernel'] - exact[-1]['kernel'])
    assert 0 < wrong.mean() < 0.02 * moved and wrong.max() < 0.1 * moved
    dtypes = {x.dtype.name: x.nbytes for x in jax.tree.leaves(optax.tree.get(smaller, 'mu'))}
    assert dtypes == {'bfloat16': 64 * 8 * 2} and optax.tree.get(smaller, 'nu')['kernel'].dtype == jnp.float32

    def num_bytes(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    assert num_bytes(state) - num_bytes(smaller) == num_bytes(params) / 2
    with pytest.raises(ValueError, match="first_moment_dtype must be one of .*'bf16'"):
        make(lambda step: 0.01, first_moment_dtype='bf16')


def test_a_first_moment_in_bfloat16_is_restored_as_it_was(tmp_path):
    params = {'kernel': jnp.ones((64, 8))}
    optimizer = optimizer_lib.adam(lambda step: 0.01, first_moment_dtype='bfloat16')
    _, opt_state = _steps(optimizer, params, _gradients(2, params))
    _assert_restored(tmp_path, params, opt_state)


def _assert_restored(folder, params, opt_state):
    """Saved and read again, an optimiser's state has the same bits and types."""
    checkpoints = manager.Checkpoints(folder)
    checkpoints.save(1, {'params': params, 'opt_state': opt_state}, {'step': 1})
    checkpoints.wait()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(lambda: {'params': params, 'opt_state': opt_state})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
    restored = checkpoints.restore(like)
    checkpoints.close()
    assert jax.tree.structure(restored.items['opt_state']) == jax.tree.structure(opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored.items['opt_state'], opt_state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, restored.items['opt_state'], opt_state))


# -- Rates by depth --


def _nested(shapes):
    tree = {}
    for name, shape in shapes.items():
        *parents, leaf = name.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.ones(shape)
    return tree


def _our_name(theirs):
    """Where a parameter of the public reference stands in our trees."""
    found = re.match(r'Transformer/encoderblock_(\d+)(_spec\w*)?/(.*)', theirs)
    if found:
        return f'encoder/{"audio" if found[2] else "video"}/layer_{found[1]}/{found[3]}'
    table = (
        ('embedding_spectrogram', 'tokenizers_audio/embedding'),
        ('embedding', 'tokenizers_video/embedding'),
        ('clsspectrogram', 'tokenizers_audio/class_token'),
        ('cls', 'tokenizers_video/class_token'),
        ('Encoder_modality_token_rgb', 'tokenizers_video/modality_token'),
        ('Encoder_modality_token_spectrogram', 'tokenizers_audio/modality_token'),
        ('bottleneck', 'encoder/bottleneck'),
        ('Transformer/encoder_norm', 'encoder/norm'),
        ('Transformer/posembed_input_spectrogram', 'tokenizers_audio/positions'),
        ('Transformer/posembed_input', 'tokenizers_video/positions'),
        ('ProjectionHeadAndClassifier_0/output_projection', 'head'),
        ('output_projection', 'head'),
    )
    for prefix, ours in table:
        if theirs == prefix or theirs.startswith(prefix + '/'):
            return ours + theirs[len(prefix) :]
    raise KeyError(theirs)


def test_layers_and_their_rates_are_those_of_the_released_models(reference):
    cases = json.loads((reference / 'optim' / 'layerwise_lr_and_wd.json').read_text())
    cases = {name: case for name, case in cases.items() if 'param_to_layer_id' in case}
    assert cases
    for name, case in cases.items():
        # The audio class token has the rate of the head there, by an oversight; it is meant to go with the other one.
        theirs = {_our_name(n): 0 if n == 'clsspectrogram' else i for n, i in case['param_to_layer_id'].items()}
        params = _nested(dict.fromkeys(theirs, (2,)))
        updates, _ = optimizer_lib.scale_layers(case['layerwise_decay']).update(params, optax.EmptyState(), params)
        ours = {
            '/'.join(str(k.key) for k in path): (int(i), float(u[0]))
            for (path, i), u in zip(
                jax.tree_util.tree_leaves_with_path(optimizer_lib.layer_ids(params)),
                jax.tree.leaves(updates),
                strict=True,
            )
        }
        scales = case['lr_scale_per_layer_id']
        assert len(scales) == case['num_transformer_layers'] + 2
        for ours_name, i in theirs.items():
            assert ours[ours_name][0] == i, f'{name}: {ours_name}'
            assert ours[ours_name][1] == pytest.approx(scales[i], rel=1e-6), f'{name}: {ours_name}'


INPUTS = {'video': (1, 2, 16, 16, 3), 'audio': (1, 16, 16)}
DEPTH = 3


def _shapes_of_model(encoder, scan, **options):
    """Shapes of the parameters of a small autoencoder."""
    compute = Compute(dtype='float32', scan=scan, attention='xla')
    model = MaskedAutoencoder(
        tokenizers={
            'video': VideoTokenizer((2, 8, 8), positions='learned', modality_token=True),
            'audio': AudioTokenizer((8, 8)),
        },
        encoder=ENCODERS[encoder](Size(8, 2, 16, DEPTH), compute, **options),
        decoder=SharedDecoder(Size(8, 2, 16, 1), compute),
    )
    inputs = {m: jnp.zeros(shape) for m, shape in INPUTS.items()}
    masks = {m: Mask(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 3), jnp.int32)) for m in INPUTS}
    return jax.eval_shape(lambda key: model.init(key, inputs, masks)['params'], jax.random.key(0))


ENCODER_CASES = [
    ('separate', {}),
    ('shared', {}),
    ('early', {}),
    ('mid', {'fusion_layer': 1}),
    ('mid', {'fusion_layer': 2}),
]


@pytest.mark.parametrize('encoder, options', ENCODER_CASES)
def test_every_encoder_counts_its_layers_from_the_input_to_the_head(encoder, options):
    params = _shapes_of_model(encoder, scan=False, **options)
    ids = optimizer_lib.layer_ids(params)
    top = DEPTH + 1
    assert set(jax.tree.leaves(ids['tokenizers_video']) + jax.tree.leaves(ids['tokenizers_audio'])) == {0}
    assert set(jax.tree.leaves(ids['decoder'])) == {top}
    joint_from = options.get('fusion_layer', 0)
    for stack, layers in ids['encoder'].items():
        first = joint_from if stack == 'joint' else 0
        for name, layer in layers.items():
            wanted = top if name == 'norm' else first + int(name.removeprefix('layer_')) + 1
            assert set(jax.tree.leaves(layer)) == {wanted}, (stack, name)
    assert max(jax.tree.leaves(ids)) == top
    assert set(range(top + 1)) == set(jax.tree.leaves(ids))


@pytest.mark.parametrize('encoder, options', ENCODER_CASES)
def test_scanned_layers_have_the_rates_of_looped_ones(encoder, options):
    looped, scanned = (_shapes_of_model(encoder, scan, **options) for scan in (False, True))
    ones = lambda shapes: jax.tree.map(lambda x: jnp.ones(x.shape), shapes)  # noqa: E731
    scale = optimizer_lib.scale_layers(0.5)
    of_loop, _ = scale.update(ones(looped), optax.EmptyState(), looped)
    of_scan, _ = scale.update(ones(scanned), optax.EmptyState(), scanned)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(of_loop), of_scan)


@pytest.mark.parametrize('name', optimizer_lib.OPTIMIZERS)
def test_a_layer_moves_by_its_share_of_what_it_would_have_moved(name):
    params = _nested({'encoder/joint/layer_0/kernel': (3,), 'encoder/joint/layer_1/kernel': (3,), 'head/kernel': (3,)})
    gradients = _gradients(3, params)
    optimizer = optimizer_lib.OPTIMIZERS[name](lambda step: 0.1)
    # Zero decay and no feedback through the parameters: updates differ by the share alone.
    plain, _ = _steps(optimizer, params, gradients[:1])
    scaled, _ = _steps(optimizer_lib.tailored(optimizer, layer_decay=0.5), params, gradients[:1])
    moved = jax.tree.map(lambda a, b, p: np.asarray((a - p) / (b - p)), scaled[0], plain[0], params)
    np.testing.assert_allclose(moved['encoder']['joint']['layer_0']['kernel'], 0.25, rtol=1e-4)
    np.testing.assert_allclose(moved['encoder']['joint']['layer_1']['kernel'], 0.5, rtol=1e-4)
    np.testing.assert_allclose(moved['head']['kernel'], 1.0, rtol=1e-4)


def test_a_decay_that_grows_is_refused():
    with pytest.raises(ValueError, match=r'layer_decay must lie in \(0, 1\]; got 1.5'):
        optimizer_lib.tailored(optimizer_lib.sgd(lambda step: 0.1), layer_decay=1.5)


# -- Frozen parameters --


@pytest.mark.parametrize('name', optimizer_lib.OPTIMIZERS)
@pytest.mark.parametrize('scan', [False, True])
def test_frozen_parameters_stay_bit_for_bit_and_the_others_move(name, scan):
    params = jax.tree.map(lambda x: jnp.ones(x.shape), _shapes_of_model('mid', scan, fusion_layer=2))
    frozen = ['tokenizers_video/', r'encoder/.*/layer_0/', 'encoder/audio/norm']
    optimizer = optimizer_lib.OPTIMIZERS[name](lambda step: 0.1)
    seen, _ = _steps(optimizer_lib.tailored(optimizer, frozen=frozen, layer_decay=0.9), params, _gradients(3, params))
    before, after = (unstack_layers(x) for x in (params, seen[-1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        path_name = rules.path_name(path)
        now = after
        for key in path:
            now = now[key.key]
        should_stay = any(re.match(pattern, path_name) for pattern in frozen)
        assert np.array_equal(now, leaf) == should_stay, path_name


def test_frozen_parameters_take_no_moments_and_count_in_no_norm():
    params = _nested({'stem/kernel': (100, 100), 'encoder/joint/layers/kernel': (2, 3), 'head/kernel': (4,)})
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), params)
    gradients['stem']['kernel'] = jnp.full((100, 100), 50.0)
    gradients['encoder']['joint']['layers']['kernel'] = jnp.asarray([[50.0] * 3, [0.1] * 3])
    optimizer = optimizer_lib.sgd(lambda step: 1.0, clip_norm=1.0)
    frozen = ['stem', 'encoder/joint/layer_0']
    seen, state = _steps(optimizer_lib.tailored(optimizer, frozen=frozen), params, [gradients])
    assert sum(x.size for x in jax.tree.leaves(state)) < 20
    np.testing.assert_allclose(seen[0]['head']['kernel'], 0.9, rtol=1e-6)
    np.testing.assert_allclose(seen[0]['encoder']['joint']['layers']['kernel'][1], 0.9, rtol=1e-6)


def test_what_is_frozen_must_be_there_and_leave_something():
    params = _nested({'encoder/video/layers/mlp/kernel': (2, 3), 'head/kernel': (3,)})
    freeze = lambda *patterns: optimizer_lib.frozen_layers(params, patterns)  # noqa: E731
    with pytest.raises(ValueError, match=r"'encoder/vido' matches no parameter; near are \['encoder/video'"):
        freeze('encoder/vido', 'head')
    with pytest.raises(ValueError, match="'encoder/video/layer_2/' matches no parameter"):
        freeze('encoder/video/layer_2/')
    with pytest.raises(ValueError, match='nothing to train'):
        freeze('')
    with pytest.raises(ValueError, match=r"frozen: 'head\(' is no regular expression"):
        optimizer_lib.tailored(optimizer_lib.sgd(lambda step: 0.1), frozen=('head(',))
    np.testing.assert_array_equal(
        freeze('encoder/video/layer_1/')['encoder']['video']['layers']['mlp']['kernel'], [False, True]
    )


# -- The average --


def test_the_average_follows_the_parameters_and_changes_no_update():
    params = {'w': jnp.zeros(2)}
    gradients = _gradients(200, params)
    plain, _ = _steps(optimizer_lib.sgd(lambda step: 0.1), params, gradients)
    seen, state = _steps(
        optimizer_lib.tailored(optimizer_lib.sgd(lambda step: 0.1), average_decay=0.9), params, gradients
    )
    np.testing.assert_array_equal(seen[-1]['w'], plain[-1]['w'])
    average = np.zeros(2)
    for i, after in enumerate(seen):
        keep = min(0.9, (1 + i) / (10 + i))
        average = keep * average + (1 - keep) * np.asarray(after['w'])
    np.testing.assert_allclose(optimizer_lib.averaged(state)['w'], average, rtol=1e-4, atol=1e-6)
    assert optimizer_lib.averaged(optimizer_lib.sgd(lambda step: 0.1).init(params)) is None


def test_parameters_that_stay_are_their_own_average():
    params = _params()
    optimizer = optimizer_lib.tailored(optimizer_lib.sgd(lambda step: 0.0), average_decay=0.99)
    _, state = _steps(optimizer, params, _gradients(5, params))
    jax.tree.map(np.testing.assert_array_equal, optimizer_lib.averaged(state), params)


def test_the_state_of_a_tailored_optimizer_is_saved_and_restored(tmp_path):
    params = _nested(
        {'encoder/joint/layers/mlp/kernel': (2, 4, 4), 'tokenizers_video/kernel': (4,), 'head/kernel': (4,)}
    )
    optimizer = optimizer_lib.tailored(
        optimizer_lib.sgd(lambda step: 0.1), layer_decay=0.5, frozen=['tokenizers_video'], average_decay=0.9
    )
    _, opt_state = _steps(optimizer, params, _gradients(2, params))
    _assert_restored(tmp_path, params, opt_state)


def test_the_average_lies_on_the_devices_of_its_parameters():
    params = {'encoder': {'joint': {'layers': {'mlp': {'up': {'kernel': jnp.ones((2, 128, 128))}}}}}}
    optimizer = optimizer_lib.tailored(optimizer_lib.sgd(lambda step: 0.1), average_decay=0.9)
    mesh = mesh_lib.make_mesh()
    shardings = rules.state_shardings((params, optimizer.init(params)), mesh, 'fsdp')
    average = optimizer_lib.averaged(shardings[1])
    assert jax.tree.leaves(average)[0].spec == jax.tree.leaves(shardings[0])[0].spec != jax.P()
