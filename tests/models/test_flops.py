import jax
import jax.numpy as jnp
import pytest

from avmae_jax.models import flops
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.decoders import DECODERS, SharedDecoder
from avmae_jax.models.encoders import ENCODERS, MidEncoder
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
