import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.decoders import DECODERS
from avmae_jax.models.encoders import ENCODERS
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, VideoTokenizer
from avmae_jax.objectives import Objective, Reconstruction

COMPUTE = Compute('float32', scan=False)
SIZE, DECODER_SIZE = Size(12, 2, 16, 2), Size(12, 2, 16, 1)
RANDOM = np.random.default_rng(0)
INPUTS = {
    'video': RANDOM.normal(size=(2, 4, 8, 8, 3)).astype(np.float32),  # 2 x 2 x 2 tokens
    'audio': RANDOM.normal(size=(2, 12, 8)).astype(np.float32),  # 3 x 2 tokens
}
RATIO = {'video': 0.75, 'audio': 0.5, 'image': 0.5}
PAIRS = [pair for pair in itertools.product(ENCODERS, DECODERS) if pair != ('separate', 'separate')]


def build(encoder='mid', decoder='shared', modalities=('video', 'audio'), **decoder_fields):
    tokenizers = {
        'video': VideoTokenizer((2, 4, 4)),
        'audio': AudioTokenizer((4, 4)),
        'image': ImageTokenizer((4, 4), positions='sincos_2d', class_token=True),
    }
    fields = {'fusion_layer': 1} if encoder == 'mid' else {}
    return MaskedAutoencoder(
        tokenizers={m: tokenizers[m] for m in modalities},
        encoder=ENCODERS[encoder](SIZE, COMPUTE, **fields),
        decoder=DECODERS[decoder](DECODER_SIZE, COMPUTE, **decoder_fields),
    )


@functools.cache
def masks_for(modalities=('video', 'audio')):
    objective = Objective({m: RATIO[m] for m in modalities}, {'reconstruction': Reconstruction()})
    grids = {'video': (2, 2, 2), 'audio': (3, 2), 'image': (2, 2)}
    return objective.draw_masks(jax.random.key(0), {m: grids[m] for m in modalities}, batch_size=2)


def make(model, inputs, masks):
    """Parameters in which nothing is zero, so that everything is seen to matter."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs, masks)['params']
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.2 + 0.3 * random.normal(size=x.shape), x.dtype), shapes)


def depends(function, inputs):
    """By modality, whether the sum of what `function` gives depends on any value of that input."""
    gradients = jax.grad(lambda x: function(x).sum())({m: jnp.asarray(x) for m, x in inputs.items()})
    return {m: bool(jnp.abs(gradient).max() > 0) for m, gradient in gradients.items()}


@pytest.mark.parametrize('encoder, decoder', PAIRS)
def test_shapes_and_who_sees_whom(encoder, decoder):
    model, masks = build(encoder, decoder), masks_for()
    params = make(model, INPUTS, masks)
    outputs = model.apply({'params': params}, INPUTS, masks)
    assert outputs.encoded['video'].shape == (2, 2, 12) and outputs.encoded['audio'].shape == (2, 3, 12)
    assert outputs.predicted['video'].shape == (2, 8, 96) == outputs.patches['video'].shape
    assert outputs.predicted_hidden['audio'].shape == (2, 3, 16)
    assert outputs.inpainted['audio'].shape == (2, 6, 16)

    seen = depends(lambda x: model.apply({'params': params}, x, masks).predicted['video'], INPUTS)
    meet = encoder in ('early', 'mid') or decoder == 'joint'
    assert seen == {'video': True, 'audio': meet}


def test_inpainting_never_sees_the_modality_it_paints_unless_the_encoder_mixes_them():
    for encoder in ('separate', 'shared', 'early'):
        model, masks = build(encoder), masks_for()
        params = make(model, INPUTS, masks)
        seen = depends(lambda x: model.apply({'params': params}, x, masks).inpainted['video'], INPUTS)  # noqa: B023
        assert seen == {'video': encoder == 'early', 'audio': True}


def test_hidden_patches_are_never_seen():
    model, masks = build('early', 'joint'), masks_for()
    params = make(model, INPUTS, masks)

    def predicted(inputs):
        return sum(x.sum() for x in model.apply({'params': params}, inputs, masks).predicted.values())

    gradients = jax.grad(predicted)({m: jnp.asarray(x) for m, x in INPUTS.items()})
    for m, gradient in gradients.items():
        cut = model.tokenizers[m].cut(gradient)
        touched = jnp.abs(cut).sum(-1) > 0
        assert not np.take_along_axis(np.asarray(touched), np.asarray(masks[m].hidden), axis=1).any()
        assert np.take_along_axis(np.asarray(touched), np.asarray(masks[m].kept), axis=1).all()


def test_predictions_for_hidden_tokens_are_those_for_all_tokens_at_their_places():
    model, masks = build(), masks_for()
    outputs = model.apply({'params': make(model, INPUTS, masks)}, INPUTS, masks)
    for m, hidden in outputs.predicted_hidden.items():
        there = np.take_along_axis(np.asarray(outputs.predicted[m]), np.asarray(masks[m].hidden)[..., None], axis=1)
        np.testing.assert_allclose(hidden, there, rtol=1e-5, atol=1e-6)


def test_the_order_of_kept_and_of_hidden_tokens_does_not_matter():
    model, masks = build(), masks_for()
    params = make(model, INPUTS, masks)
    turned = {m: type(mask)(kept=mask.kept[:, ::-1], hidden=mask.hidden[:, ::-1]) for m, mask in masks.items()}
    one = model.apply({'params': params}, INPUTS, masks).predicted
    two = model.apply({'params': params}, INPUTS, turned).predicted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


def test_shuffled_inpainting_gives_every_place_its_own_position():
    # Without mixing, what is painted at a place depends on the other modality and that place alone, wherever its mask
    # token came in the sequence: two shuffles that ask for the same places paint the same there.
    model, masks = build('separate'), masks_for()
    params = make(model, INPUTS, masks)
    first = jnp.asarray([[7, 1, 0, 2, 3, 4, 5, 6]] * 2)
    second = first[:, jnp.asarray([0, 1, 2, 7, 6, 5, 4, 3])]  # The three places of audio's tokens stay.
    run = lambda places: model.apply({'params': params}, INPUTS, masks, {'video': places})  # noqa: E731
    one, two = run(first), run(second)
    np.testing.assert_array_equal(one.inpainted_mask['video'], [[0, 0, 1, 1, 1, 1, 1, 0]] * 2)
    np.testing.assert_allclose(one.inpainted['video'], two.inpainted['video'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_features_of_one_modality_need_no_other(encoder):
    model, masks = build(encoder), masks_for()
    params = make(model, INPUTS, masks)
    both = model.apply({'params': params}, INPUTS, method='encode')
    alone = model.apply({'params': params}, {'audio': INPUTS['audio']}, method='encode')
    assert both['audio'].shape == alone['audio'].shape == (2, 6, 12) and set(alone) == {'audio'}
    same = np.allclose(both['audio'], alone['audio'], atol=1e-5)
    assert same == (encoder in ('separate', 'shared'))


def test_an_image_model_carries_its_class_token_and_does_not_predict_it():
    model, masks = build('early', 'joint', ('image',)), masks_for(('image',))
    inputs = {'image': RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)}
    params = make(model, inputs, masks)
    outputs = model.apply({'params': params}, inputs, masks)
    assert outputs.encoded['image'].shape == (2, 1 + 2, 12)
    assert outputs.predicted['image'].shape == (2, 4, 48)
    assert outputs.inpainted == {}
    assert model.apply({'params': params}, inputs, method='encode')['image'].shape == (2, 1 + 4, 12)


def test_a_fresh_model_predicts_zero_and_mask_tokens_start_at_zero():
    model, masks = build(), masks_for()
    params = jax.jit(model.init)(jax.random.key(0), INPUTS, masks)['params']
    assert not np.any(params['decoder']['filler_video']['mask_token'])
    assert not np.any(model.apply({'params': params}, INPUTS, masks).predicted['video'])


def test_what_would_never_meet_is_refused():
    with pytest.raises(ValueError, match='never meet'):
        build('separate', 'separate')
    build('separate', 'separate', ('audio',))  # Alone, there is nobody to meet.


@pytest.mark.parametrize('fusion_layer', [0, 2])
def test_a_mid_encoder_needs_layers_before_and_after_it(fusion_layer):
    with pytest.raises(ValueError, match='fusion_layer must lie between 1 and num_layers - 1 = 1'):
        ENCODERS['mid'](SIZE, COMPUTE, fusion_layer=fusion_layer)
