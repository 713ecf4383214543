"""ViTs in Google's dialects compute what a ViT written down in numpy computes, and other models start from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.checkpoints.transfer import INFLATED, KEPT, LEFT_OVER, RESIZED, TAKEN, transfer
from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.sizes import SIZES, Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.weights import vit

SIZE, PATCH, GRID, CLASSES = Size(12, 2, 20, 2), (4, 4), (3, 3), 7
LOOP = Compute('float32', scan=False)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


def published(size=SIZE, patch=PATCH, places=10, classes=CLASSES, representation=6, token=True, seed=1):
    """Made-up weights under the names of the first ViT files."""
    random = np.random.default_rng(seed)
    width, heads, head_width = size.width, size.num_heads, size.width // size.num_heads
    shapes = {
        'embedding/kernel': (*patch, 3, width),
        'embedding/bias': (width,),
        'Transformer/posembed_input/pos_embedding': (1, places, width),
        'Transformer/encoder_norm/scale': (width,),
        'Transformer/encoder_norm/bias': (width,),
        'head/kernel': (representation or width, classes),
        'head/bias': (classes,),
    }
    if token:
        shapes['cls'] = (1, 1, width)
    if representation:
        shapes |= {'pre_logits/kernel': (width, representation), 'pre_logits/bias': (representation,)}
    for i in range(size.num_layers):
        block = f'Transformer/encoderblock_{i}'
        for name in ('LayerNorm_0', 'LayerNorm_2'):
            shapes |= {f'{block}/{name}/scale': (width,), f'{block}/{name}/bias': (width,)}
        for name in ('query', 'key', 'value'):
            shapes[f'{block}/MultiHeadDotProductAttention_1/{name}/kernel'] = (width, heads, head_width)
            shapes[f'{block}/MultiHeadDotProductAttention_1/{name}/bias'] = (heads, head_width)
        shapes[f'{block}/MultiHeadDotProductAttention_1/out/kernel'] = (heads, head_width, width)
        shapes[f'{block}/MultiHeadDotProductAttention_1/out/bias'] = (width,)
        for name, sizes in (('Dense_0', (width, size.mlp_width)), ('Dense_1', (size.mlp_width, width))):
            shapes |= {f'{block}/MlpBlock_3/{name}/kernel': sizes, f'{block}/MlpBlock_3/{name}/bias': sizes[1:]}
    return {name: (0.3 * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def numpy_vit(weights, images, size=SIZE, patch=PATCH):
    """The ViT of the paper, step by step: tokens after the last norm, and what the head gets."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f'{name}/scale'] + weights[f'{name}/bias']

    def attend(x, name):
        query, key, value = (
            np.einsum('bnd,dhc->bhnc', x, weights[f'{name}/{part}/kernel']) + weights[f'{name}/{part}/bias'][:, None]
            for part in ('query', 'key', 'value')
        )
        scores = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1]))
        seen = scores / scores.sum(-1, keepdims=True) @ value
        return np.einsum('bhnc,hcd->bnd', seen, weights[f'{name}/out/kernel']) + weights[f'{name}/out/bias']

    def dense(x, name):
        return x @ weights[f'{name}/kernel'] + weights[f'{name}/bias']

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    rows = []
    for top in range(0, images.shape[1], patch[0]):
        for left in range(0, images.shape[2], patch[1]):
            cut = images[:, top : top + patch[0], left : left + patch[1]]
            rows.append(np.einsum('bhwc,hwcd->bd', cut, weights['embedding/kernel']) + weights['embedding/bias'])
    x = np.stack(rows, axis=1)
    if 'cls' in weights:
        x = np.concatenate([np.repeat(weights['cls'], len(x), axis=0), x], axis=1)
    x = x + weights['Transformer/posembed_input/pos_embedding']
    for i in range(size.num_layers):
        block = f'Transformer/encoderblock_{i}'
        x = x + attend(norm(x, f'{block}/LayerNorm_0'), f'{block}/MultiHeadDotProductAttention_1')
        hidden = gelu(dense(norm(x, f'{block}/LayerNorm_2'), f'{block}/MlpBlock_3/Dense_0'))
        x = x + dense(hidden, f'{block}/MlpBlock_3/Dense_1')
    x = norm(x, 'Transformer/encoder_norm')
    pooled = x[:, 0] if 'cls' in weights else x.mean(1)
    return x, np.tanh(dense(pooled, 'pre_logits')) if 'pre_logits/kernel' in weights else pooled


def close(ours, wanted):
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('token, representation, scan', [(True, 6, False), (True, None, True), (False, None, False)])
def test_a_published_vit_computes_what_numpy_does(tmp_path, token, representation, scan):
    weights = published(token=token, places=9 + token, representation=representation)
    np.savez(tmp_path / 'vit.npz', **weights)
    made = vit.read(tmp_path / 'vit.npz', Compute('float32', scan=scan))
    assert made.grid == GRID and made.model.encoder.size == SIZE and made.model.tokenizers['image'].patch == PATCH
    scores = made.model.apply({'params': made.params}, {'image': IMAGES})
    tokens, features = numpy_vit(weights, IMAGES)
    close(scores.encoded['image'], tokens)
    (pooled,) = scores.pooled.values()
    close(pooled, features)
    close(scores.averaged['label'], features @ weights['head/kernel'] + weights['head/bias'])


def big_vision(weights):
    """As big_vision names them: its table of positions lies outside and has no place for the class token."""
    renamed = {
        name.replace('ProductAttention_1', 'ProductAttention_0')
        .replace('LayerNorm_2', 'LayerNorm_1')
        .replace('MlpBlock_3', 'MlpBlock_0'): array
        for name, array in weights.items()
    }
    table = renamed.pop('Transformer/posembed_input/pos_embedding')
    renamed['cls'] = renamed['cls'] + table[:, :1]
    return renamed | {'pos_embedding': table[:, 1:]}


def scanned(weights):
    """As big_vision stores a scanned model."""
    blocks = {name for name in weights if 'encoderblock_' in name}
    rest = {name: array for name, array in weights.items() if name not in blocks}
    for name in {name for name in blocks if 'encoderblock_0/' in name}:
        layers = [weights[name.replace('encoderblock_0', f'encoderblock_{i}')] for i in range(SIZE.num_layers)]
        rest[name.replace('encoderblock_0', 'encoderblock')] = np.stack(layers)
    return rest


def prefixed(weights, prefix):
    return {prefix + name: array for name, array in weights.items()}


DIALECTS = {
    'big_vision': big_vision,
    'big_vision scanned': lambda weights: scanned(big_vision(weights)),
    'a training state': lambda weights: prefixed(big_vision(weights), 'params/') | {'opt/0/count': np.zeros(())},
    'an old training state': lambda weights: prefixed(weights, 'opt/target/') | {'opt/state/step': np.zeros(())},
    'scenic': lambda weights: {name.replace('head/', 'output_projection/'): x for name, x in weights.items()},
}


@pytest.mark.parametrize('dialect', DIALECTS)
def test_every_dialect_is_the_same_vit(dialect):
    weights = published()
    made = vit.load(DIALECTS[dialect](weights), LOOP)
    scores = made.model.apply({'params': made.params}, {'image': IMAGES})
    close(scores.averaged['label'], numpy_vit(weights, IMAGES)[1] @ weights['head/kernel'] + weights['head/bias'])


def test_a_vit_without_its_head_gets_one_that_says_nothing():
    weights = {name: array for name, array in published().items() if not name.startswith('head/')}
    made = vit.load(weights, LOOP)
    scores = made.model.apply({'params': made.params}, {'image': IMAGES})
    assert not np.any(scores.averaged['label'])
    close(scores.encoded['image'], numpy_vit(weights, IMAGES)[0])


def test_vit_ti_has_as_many_parameters_as_were_published():
    weights = published(SIZES['Ti'], (16, 16), places=197, classes=1000, representation=None)
    made = vit.load(weights, Compute())
    assert made.model.encoder.size == SIZES['Ti'] and made.grid == (14, 14)
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) == 5_717_416  # Touvron et al. 2021: 5.7 M


def test_what_is_no_vit_is_refused(tmp_path):
    weights = published()
    (tmp_path / 'text.npz').write_text('no weights')
    with pytest.raises(ValueError, match='text.npz is no .npz file that can be read'):
        vit.read(tmp_path / 'text.npz', LOOP)
    np.savez(tmp_path / 'other.npz', weights=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz: a ViT has 'embedding/kernel', and here are weights"):
        vit.read(tmp_path / 'other.npz', LOOP)
    gone = 'Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias'
    for wrong, complaint in [
        ({**weights, 'gn_root/scale': np.zeros(3)}, 'these were given and no rule takes them: gn_root/scale'),
        ({**weights, 'embedding/kernel': np.zeros((1, 1, 1024, 12))}, 'ViTs behind a ResNet are not read'),
        ({name: x for name, x in weights.items() if 'posembed' not in name}, 'there is no pos_embedding'),
        (published(places=12), 'has 11 places for patches, which is no square'),
        ({name: x for name, x in weights.items() if name != gone}, 'nothing was given for them: .*layer_1/mlp/up/bias'),
    ]:
        with pytest.raises(ValueError, match=complaint):
            vit.load(wrong, LOOP)


def from_images(tokenizers, inputs, fusion_layer, made, **fields):
    """An MBT that starts from a ViT: (model, parameters, report)."""
    encoder = MBT(SIZE, LOOP, fusion_layer=fusion_layer)
    model = Classifier(tokenizers, encoder, {'action': 5}, pooling='token', representation=6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']
    random = np.random.default_rng(5)
    fresh = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)
    params, report = transfer(
        fresh,
        made.params,
        tokenizers=tokenizers,
        source_tokenizers=made.model.tokenizers,
        grids=model.grids(inputs),
        source_grids={'image': made.grid},
        **fields,
    )
    return model, params, report


@pytest.mark.parametrize('dialect', [dict, big_vision])
@pytest.mark.parametrize('inflation', ['central', 'average'])
def test_streams_that_start_from_a_vit_say_of_a_picture_what_it_said(inflation, dialect):
    """Up to the head: of a clip of one tubelet, and of a spectrogram that is painted as a picture is."""
    weights = published()
    still = np.repeat(IMAGES[:, None], 3, axis=1)
    if inflation == 'central':
        still[:, [0, 2]] = 7.0
    fields = {'positions': 'learned', 'class_token': True, 'class_position': True}
    tokenizers = {'video': VideoTokenizer((3, 4, 4), **fields), 'audio': AudioTokenizer((4, 4), **fields, channels=3)}
    inputs = {'video': still, 'audio': IMAGES[::-1]}
    made = vit.load(dialect(weights), Compute('float32', scan=True))
    model, params, report = from_images(tokenizers, inputs, SIZE.num_layers, made, inflation=inflation)
    scores = model.apply({'params': params}, inputs)
    close(scores.pooled['video'], numpy_vit(weights, IMAGES)[1])
    close(scores.pooled['audio'], numpy_vit(weights, IMAGES[::-1])[1])
    assert set(report.names(KEPT)) == {'head_action/kernel', 'head_action/bias', 'encoder/bottlenecks'}
    assert set(report.names(LEFT_OVER)) == {'head_label/kernel', 'head_label/bias'}
    assert report.names(INFLATED) == ['tokenizers_video/embedding/kernel'] and not report.names(RESIZED)
    assert 'tokenizers_audio/embedding/kernel' in report.names(TAKEN)
    assert 'encoder/audio/layer_1/mlp/up/kernel' in report.names(TAKEN)
