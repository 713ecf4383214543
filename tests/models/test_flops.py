import jax
import jax.numpy as jnp
import pytest

from avmae_jax.models import flops
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import POOLINGS, Classifier
from avmae_jax.models.decoders import DECODERS, SharedDecoder
from avmae_jax.models.encoders import ENCODERS, MidEncoder, SharedEncoder
from avmae_jax.models.sizes import DECODER_SIZES, SIZES, Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.objectives import TERMS, Objective

RATIO = {'video': 0.9, 'audio': 0.7}


@pytest.mark.parametrize(
    'encoder, decoder, term',
    [('mid', 'shared', 'reconstruction'), ('early', 'joint', 'reconstruction'), ('separate', 'shared', 'inpainting')],
)
def test_the_count_is_xlas_but_for_what_is_not_a_matrix_product(encoder, decoder, term):
    compute = Compute('float32', scan=False)
    fields = {'fusion_layer': 1} if encoder == 'mid' else {}
    model = MaskedAutoencoder(
        {'video': VideoTokenizer((2, 8, 8)), 'audio': AudioTokenizer((8, 8))},
        ENCODERS[encoder](Size(128, 2, 512, 2), compute, **fields),
        DECODERS[decoder](Size(64, 2, 256, 1), compute),
    )
    shapes = {'video': (2, 4, 64, 64, 3), 'audio': (2, 96, 64)}
    inputs = {m: jax.ShapeDtypeStruct(shape, jnp.float32) for m, shape in shapes.items()}
    objective = Objective(RATIO, {term: TERMS[term]()})
    key = jax.random.key(0)
    masks = jax.eval_shape(lambda: objective.draw_masks(key, model.grids(inputs), 2))
    params = jax.eval_shape(model.init, key, inputs, masks)['params']

    def loss(params, inputs, masks):
        return objective(model, params, None, inputs, None, key, masks)[0]

    counted = jax.jit(jax.grad(loss)).lower(params, inputs, masks).cost_analysis()['flops'] / 2
    ours = flops.training_flops(model, shapes, RATIO, [term])
    assert 0.9 * counted < ours < counted


def test_a_step_of_the_published_large_model_needs_no_more_than_the_reference():
    model = MaskedAutoencoder(
        {'video': VideoTokenizer((2, 16, 16)), 'audio': AudioTokenizer((16, 16))},
        MidEncoder(SIZES['L'], fusion_layer=22),
        SharedDecoder(DECODER_SIZES['L']),
    )
    shapes = {'video': (1, 16, 224, 224, 3), 'audio': (1, 1000, 128)}
    assert 790e9 < flops.training_flops(model, shapes, RATIO) < 814e9


SHAPES = {'video': (2, 4, 32, 32, 3), 'audio': (2, 64, 32)}  # 32 tokens each
COMPUTE, SIZE = Compute('float32', scan=False), Size(128, 2, 512, 2)
MBTS = {
    'never': MBT(SIZE, COMPUTE, fusion_layer=2),
    'bottleneck': MBT(SIZE, COMPUTE, fusion_layer=1, num_bottlenecks=16),
    'concatenation': MBT(SIZE, COMPUTE, fusion_layer=1, fusion='concatenation'),
    'one stream': MBT(SIZE, COMPUTE, fusion_layer=0, fusion='concatenation', shared_weights=True),
    'one set of weights': SharedEncoder(SIZE, COMPUTE),
}


def classifier(encoder, modalities=tuple(SHAPES), **fields):
    tokenizers = {'video': VideoTokenizer((2, 8, 8)), 'audio': AudioTokenizer((8, 8), class_token=True)}
    return Classifier({m: tokenizers[m] for m in modalities}, encoder, {'verb': 300, 'noun': 500}, **fields)


@pytest.mark.parametrize('fusion', MBTS)
@pytest.mark.parametrize('modalities', [('video', 'audio'), ('audio',)], ids='+'.join)
def test_the_count_of_a_classifier_is_xlas_too(fusion, modalities):
    model = classifier(MBTS[fusion], modalities, representation=96)
    shapes = {m: SHAPES[m] for m in modalities}
    inputs = {m: jax.ShapeDtypeStruct(shape, jnp.float32) for m, shape in shapes.items()}
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']

    def loss(params, inputs):
        scores = model.apply({'params': params}, inputs, train=True)
        return sum(jnp.sum(x**2) for parts in scores.logits.values() for x in parts.values())

    counted = jax.jit(jax.grad(loss)).lower(params, inputs).cost_analysis()['flops'] / 2
    ours = flops.training_flops(model, shapes)
    if fusion == 'concatenation' and len(modalities) > 1:
        # The program also makes queries for the tokens of the other stream, and throws away what they found.
        others, seen = 33 + 32, 33 + 32
        ours += 3 * (2 * others * 128 * 128 + 4 * 128 * others * seen)
    assert 0.9 * counted < ours < counted


def test_every_part_of_a_classifier_is_counted_for_what_it_is():
    base = classifier(MBTS['never'])
    parts = flops.classifier_flops(base, SHAPES)
    assert parts['embedding'] == 2 * 32 * 384 * 128 + 2 * 32 * 64 * 128
    assert parts['encoder'] == flops.stack_flops(SIZE, [32, 33])
    assert parts['representation'] == 0 and parts['heads'] == 2 * 2 * 128 * 800
    more = flops.classifier_flops(classifier(MBTS['never'], representation=64), SHAPES)
    assert more['representation'] == 2 * 2 * 128 * 64 and more['heads'] == 2 * 2 * 64 * 800
    fused = flops.classifier_flops(classifier(MBTS['bottleneck']), SHAPES)['encoder']
    assert fused == flops.stack_flops(SIZE, [32, 33], 1) + flops.stack_flops(SIZE, [48, 49], 1)
    joined = flops.classifier_flops(classifier(MBTS['concatenation']), SHAPES)['encoder']
    # Each stream's keys and values of the other's tokens, and looking at them.
    assert joined == parts['encoder'] + 2 * (33 + 32) * 128 * 256 + 2 * 4 * 128 * 32 * 33
    alone = flops.classifier_flops(classifier(MBTS['bottleneck'], ('audio',)), {'audio': SHAPES['audio']})
    assert alone['encoder'] == flops.stack_flops(SIZE, [33])
    for pooling in set(POOLINGS) - {'token', 'one_token'}:
        vectors = 1 if pooling == 'joint_mean' else 2
        counted = flops.classifier_flops(classifier(MBTS['never'], pooling=pooling), SHAPES)
        assert counted['heads'] == vectors * 2 * 128 * 800


def test_bottlenecks_cost_less_than_full_attention_in_the_published_model():
    tokenizers = {'video': VideoTokenizer((2, 16, 16)), 'audio': AudioTokenizer((16, 16))}
    shapes = {'video': (1, 32, 224, 224, 3), 'audio': (1, 1000, 128)}

    def count(**fields):
        return flops.training_flops(Classifier(tokenizers, MBT(SIZES['L'], **fields), {'label': 527}), shapes)

    late, fused = count(fusion_layer=24), count(fusion_layer=18)
    full = count(fusion_layer=18, fusion='concatenation')
    assert late < fused < 1.002 * late < full
