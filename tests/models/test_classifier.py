import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import JOINT, POOLINGS, Classifier, average_present
from avmae_jax.models.encoders import EarlyEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.parallel import rules

SIZE, COMPUTE = Size(12, 2, 16, 2), Compute('float32', scan=False)
RANDOM = np.random.default_rng(0)
INPUTS = {
    'video': RANDOM.normal(size=(2, 2, 8, 8, 3)).astype(np.float32),  # 1 x 2 x 2 tokens
    'audio': RANDOM.normal(size=(2, 8, 4)).astype(np.float32),  # 2 x 2 tokens
}


def build(pooling='mean', class_token=True, modalities=('video', 'audio'), num_classes=None, **fields):
    fields = {'encoder': MBT(SIZE, COMPUTE, fusion_layer=1, num_bottlenecks=2), **fields}
    tokenizers = {
        'video': VideoTokenizer((2, 4, 4), class_token=class_token, class_position=class_token),
        'audio': AudioTokenizer((4, 2), class_token=class_token, class_position=class_token),
    }
    tokenizers = {m: tokenizers[m] for m in modalities}
    return Classifier(tokenizers, num_classes=num_classes or {'label': 5}, pooling=pooling, **fields)


def make(model, inputs=INPUTS):
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape) + 0.2, jnp.float32), shapes)


@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize('pooled_norm, representation', [(True, None), (False, 7)])
def test_each_head_scores_each_part_and_the_clip_by_their_mean(pooling, pooled_norm, representation):
    heads = {'verb': 5, 'noun': 3}
    model = build(pooling, num_classes=heads, pooled_norm=pooled_norm, representation=representation)
    params = make(model)
    scores = jax.jit(model.apply)({'params': params}, INPUTS)
    parts = {JOINT} if pooling in ('one_token', 'joint_mean') else {'video', 'audio'}
    for head, classes in heads.items():
        assert set(scores.logits[head]) == parts
        assert all(x.shape == (2, classes) for x in scores.logits[head].values())
        mean = sum(scores.logits[head].values()) / len(parts)
        np.testing.assert_allclose(scores.averaged[head], mean, rtol=1e-5)
    assert {x.shape[-1] for x in scores.pooled.values()} == {representation or 12}
    assert ('norm' in params) == pooled_norm and ('representation' in params) == bool(representation)


def test_pooling_takes_of_the_tokens_what_its_name_says():
    params = make(build())
    encoded = build().apply({'params': params}, INPUTS, method='encode')
    video, audio = np.asarray(encoded['video']), np.asarray(encoded['audio'])
    assert video.shape == (2, 1 + 4, 12)
    wanted = {
        'mean': {'video': video[:, 1:].mean(1), 'audio': audio[:, 1:].mean(1)},
        'max': {'video': video[:, 1:].max(1), 'audio': audio[:, 1:].max(1)},
        'first': {'video': video[:, 1], 'audio': audio[:, 1]},
        'token': {'video': video[:, 0], 'audio': audio[:, 0]},
        'one_token': {JOINT: video[:, 0]},
        'joint_mean': {JOINT: np.concatenate([video[:, 1:], audio[:, 1:]], axis=1).mean(1)},
    }
    assert set(wanted) == set(POOLINGS)
    for pooling, parts in wanted.items():
        pooled = build(pooling).apply({'params': params}, INPUTS).pooled
        assert set(pooled) == set(parts)
        for part in parts:
            np.testing.assert_allclose(pooled[part], parts[part], rtol=1e-5, atol=1e-6)


def test_a_fresh_head_says_nothing():
    scores, _ = jax.jit(build().init_with_output)(jax.random.key(0), INPUTS)
    assert not np.any(scores.averaged['label'])


def test_the_encoders_of_the_autoencoder_can_be_finetuned_too():
    model = build(encoder=EarlyEncoder(SIZE, COMPUTE))
    assert model.apply({'params': make(model)}, INPUTS).averaged['label'].shape == (2, 5)


@pytest.mark.parametrize('pooling', ['mean', 'token', 'joint_mean'])
def test_a_clip_without_one_modality_is_scored_by_the_other(pooling):
    model = build(pooling)
    scores = model.apply({'params': make(model)}, {'audio': INPUTS['audio']})
    assert scores.averaged['label'].shape == (2, 5) and set(scores.encoded) == {'audio'}


def test_a_row_is_averaged_over_what_it_has():
    x = {part: RANDOM.normal(size=(4, 3)).astype(np.float32) for part in ('video', 'audio')}
    present = {'video': np.array([True, True, False, False]), 'audio': np.array([True, False, True, False])}
    both = (x['video'] + x['audio']) / 2
    wanted = np.stack([both[0], x['video'][1], x['audio'][2], both[3]])
    np.testing.assert_allclose(jax.jit(average_present)(x, present), wanted, rtol=1e-6)
    np.testing.assert_allclose(average_present(x, {}), both, rtol=1e-6)
    x['audio'][1] = np.inf  # What a model makes of nothing says nothing.
    np.testing.assert_allclose(average_present(x, present)[1], x['video'][1], rtol=1e-6)


def test_a_part_that_is_no_modality_counts_always():
    x = {JOINT: np.ones((2, 3), np.float32), 'audio': np.zeros((2, 3), np.float32)}
    present = {'video': np.array([True, False]), 'audio': np.array([True, False])}
    np.testing.assert_allclose(average_present(x, present), [[0.5] * 3, [1.0] * 3])
    np.testing.assert_allclose(average_present({JOINT: x[JOINT]}, present), x[JOINT])


@pytest.mark.parametrize('pooling', ['mean', 'joint_mean'])
def test_the_classifier_scores_a_clip_by_what_it_has(pooling):
    model = build(pooling, num_classes={'verb': 5, 'noun': 3})
    params, present = {'params': make(model)}, {'video': np.array([True, False]), 'audio': np.array([True, True])}
    scores = jax.jit(model.apply)(params, INPUTS, present=present)
    for head, parts in scores.logits.items():
        mean = sum(parts.values()) / len(parts)
        np.testing.assert_allclose(scores.averaged[head][0], mean[0], rtol=1e-5)
        np.testing.assert_allclose(scores.averaged[head][1], parts.get('audio', mean)[1], rtol=1e-5)


def test_training_with_drop_path_takes_its_rng():
    model = build(encoder=MBT(SIZE, COMPUTE, fusion_layer=1, drop_path=0.5))
    params = make(model)
    apply = jax.jit(lambda key: model.apply({'params': params}, INPUTS, train=True, rngs={'drop_path': key}))
    first, *others = (apply(jax.random.key(seed)).averaged['label'] for seed in range(4))
    assert not all(np.allclose(first, other, atol=1e-4) for other in others)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"class_token=True for \['video', 'audio'\]"):
        build('token', class_token=False)
    with pytest.raises(ValueError, match="pooling must be one of .* got 'sum'"):
        build('sum')
    with pytest.raises(ValueError, match='at least one class'):
        build(num_classes={'label': 0})


def test_every_parameter_has_named_dimensions():
    model = build('token', num_classes={'verb': 5, 'noun': 3}, representation=7, pooled_norm=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS)['params']
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert rules.dimension_names(rules.path_name(path), leaf.ndim) is not None, path
