"""What models of video and sound take from a model of images; ViTs as they are published are in weights/test_vit.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.checkpoints.transfer import INFLATED, INFLATIONS, KEPT, LEFT_OVER, MERGED, RESIZED, TAKEN, transfer
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import ENCODERS, SharedEncoder
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, VideoTokenizer
from avmae_jax.objectives import Objective, Reconstruction
from avmae_jax.ops.positions import resize_table

LOOP, SIZE = Compute('float32', scan=False), Size(8, 2, 16, 3)
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.normal(size=(2, 6, 6, 3)).astype(np.float32)  # 3 x 3 patches
SOUND = RANDOM.normal(size=(2, 6, 6)).astype(np.float32)
LEARNED = {'positions': 'learned', 'class_token': True, 'class_position': True}


def made_up(shapes, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)


def image_autoencoder(encoder='shared', **fields):
    model = MaskedAutoencoder(
        {'image': ImageTokenizer((2, 2), **{**LEARNED, **fields})},
        ENCODERS[encoder](SIZE, LOOP),
        SharedDecoder(Size(8, 2, 16, 1), LOOP),
    )
    inputs = {'image': PICTURE}
    objective = Objective({'image': 0.5}, {'reconstruction': Reconstruction()})
    masks = objective.draw_masks(jax.random.key(0), model.grids(inputs), batch_size=2)
    return model, made_up(jax.eval_shape(model.init, jax.random.key(0), inputs, masks)['params'], seed=1)


def start(tokenizers, inputs, image=None, encoder=None, **fields):
    """A classifier that starts from an image MAE: (model, parameters, report)."""
    image_model, source = image or image_autoencoder()
    model = Classifier(tokenizers, encoder or MBT(SIZE, LOOP, fusion_layer=2), {'label': 5})
    fresh = made_up(jax.eval_shape(model.init, jax.random.key(0), inputs)['params'], seed=2)
    params, report = transfer(
        fresh,
        source,
        tokenizers=tokenizers,
        source_tokenizers=image_model.tokenizers,
        grids=model.grids(inputs),
        source_grids=image_model.grids({'image': PICTURE}),
        **fields,
    )
    return model, params, report


def tokens_of(model, params, modality, media):
    """What the encoder gets: [b, class token and patches, d]."""
    tokenizer = model.tokenizers[modality]
    own = {'params': params[f'tokenizers_{modality}']}
    return tokenizer.apply(own, tokenizer.cut(media), tokenizer.grid(media.shape), None, SIZE.width, 'float32')


def close(ours, wanted):
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


KINDS = {
    'learned': LEARNED,
    'no place for the class token': {**LEARNED, 'class_position': False},
    'space and time': {'positions': 'learned_space_time', 'class_token': True},
}


@pytest.mark.parametrize('inflation', INFLATIONS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('frames', [1, 2, 3])
def test_a_video_of_a_still_picture_has_the_pictures_tokens_at_every_moment(inflation, kind, frames):
    video = np.repeat(PICTURE[:, None], 2 * frames, axis=1)
    tokenizers = {'video': VideoTokenizer((frames, 2, 2), **KINDS[kind])}
    image = image_autoencoder()
    model, params, report = start(tokenizers, {'video': video}, image, inflation=inflation)
    wanted = tokens_of(*image, 'image', PICTURE)
    got = tokens_of(model, params, 'video', video)
    close(got[:, :1], wanted[:, :1])
    close(got[:, 1:10], wanted[:, 1:])
    close(got[:, 10:], wanted[:, 1:])
    assert ('tokenizers_video/class_token' in report.names(MERGED)) == (kind != 'learned')
    assert ('tokenizers_video/embedding/kernel' in report.names(INFLATED)) == (frames > 1)
    assert 'tokenizers_image/positions/table' not in report.names(LEFT_OVER)


@pytest.mark.parametrize('frames, middle', [(2, 1), (3, 1), (4, 2)])
def test_a_central_stem_sees_the_frame_in_the_middle_and_an_averaging_one_their_mean(frames, middle):
    clip = RANDOM.normal(size=(2, frames, 6, 6, 3)).astype(np.float32)
    tokenizers, image = {'video': VideoTokenizer((frames, 2, 2), **LEARNED)}, image_autoencoder()
    for inflation, picture in (('central', clip[:, middle]), ('average', clip.mean(1))):
        model, params, _ = start(tokenizers, {'video': clip}, image, inflation=inflation)
        close(tokens_of(model, params, 'video', clip), tokens_of(*image, 'image', picture))


def test_the_stem_of_sound_is_the_mean_over_the_colours():
    image, sound = image_autoencoder(), {'audio': SOUND}
    model, params, report = start({'audio': AudioTokenizer((2, 2), **LEARNED)}, sound, image)
    assert report.names(INFLATED) == ['tokenizers_audio/embedding/kernel']
    gray = np.repeat(SOUND[..., None] / 3, 3, axis=-1)
    close(tokens_of(model, params, 'audio', SOUND), tokens_of(*image, 'image', gray))
    # As it sounds in one colour alone, on average.
    alone = [tokens_of(*image, 'image', SOUND[..., None] * np.eye(3, dtype=np.float32)[i]) for i in range(3)]
    close(tokens_of(model, params, 'audio', SOUND), sum(alone) / 3)
    model, params, report = start({'audio': AudioTokenizer((2, 2), **LEARNED, channels=3)}, sound, image)
    assert not report.names(INFLATED)
    close(tokens_of(model, params, 'audio', SOUND), tokens_of(*image, 'image', 3 * gray))


@pytest.mark.parametrize('token', [True, False])
def test_positions_are_resized_on_their_grid_and_the_same_at_every_moment(token):
    inputs = {'video': np.zeros((2, 4, 10, 6, 3), np.float32), 'audio': np.zeros((2, 14, 4), np.float32)}
    fields = LEARNED if token else {'positions': 'learned'}
    tokenizers = {'video': VideoTokenizer((2, 2, 2), **fields), 'audio': AudioTokenizer((2, 2), **fields)}
    image = image_autoencoder()
    _, params, report = start(tokenizers, inputs, image)
    table = np.asarray(image[1]['tokenizers_image']['positions']['table'])
    for modality, grid, moments in (('video', (5, 3), 2), ('audio', (7, 2), 1)):
        ours = np.asarray(params[f'tokenizers_{modality}']['positions']['table'])
        wanted = [table[:1]] * token + [resize_table(table[1:], (3, 3), grid)] * moments
        close(ours, np.concatenate(wanted))
    assert 'tokenizers_audio/positions/table' in report.names(RESIZED)
    assert 'tokenizers_video/positions/table' in report.names(INFLATED)
    assert ('tokenizers_image/class_token' in report.names(LEFT_OVER)) == (not token)


@pytest.mark.parametrize('theirs', [1, 2])
@pytest.mark.parametrize('ours', [1, 2])
def test_tokens_in_front_keep_their_places_when_positions_are_resized(ours, theirs):
    sounds = np.zeros((2, 10, 8), np.float32)
    fields = [LEARNED | {'distillation_token': count == 2, 'stride': (1, 2)} for count in (ours, theirs)]
    tokenizer, source_tokenizer = (AudioTokenizer((2, 2), **each) for each in fields)
    small = Classifier({'audio': source_tokenizer}, SharedEncoder(SIZE, LOOP), {'label': 5}, pooling='token')
    source = made_up(jax.eval_shape(small.init, jax.random.key(0), {'audio': SOUND})['params'], seed=4)
    model = Classifier({'audio': tokenizer}, SharedEncoder(SIZE, LOOP), {'label': 5}, pooling='token')
    fresh = made_up(jax.eval_shape(model.init, jax.random.key(0), {'audio': sounds})['params'], seed=5)
    params, report = transfer(
        fresh,
        source,
        tokenizers=model.tokenizers,
        source_tokenizers=small.tokenizers,
        grids=model.grids({'audio': sounds}),
        source_grids=small.grids({'audio': SOUND}),
    )
    assert model.grids({'audio': sounds}) == {'audio': (9, 4)} and small.grids({'audio': SOUND}) == {'audio': (5, 3)}
    table, old, new = (np.asarray(x['tokenizers_audio']['positions']['table']) for x in (params, source, fresh))
    shared = min(ours, theirs)
    np.testing.assert_array_equal(table[:shared], old[:shared])
    np.testing.assert_array_equal(table[shared:ours], new[shared:ours])
    close(table[ours:], resize_table(old[theirs:], (5, 3), (9, 4)))
    left = 'tokenizers_audio/distillation_token' in report.names(LEFT_OVER)
    assert left == (theirs > ours) and report.names(RESIZED) == ['tokenizers_audio/positions/table']


def test_tokens_in_front_without_a_position_take_it_with_them():
    placed = AudioTokenizer((2, 2), **LEARNED, distillation_token=True)
    bare = AudioTokenizer((2, 2), 'learned', class_token=True, distillation_token=True)
    models = [
        Classifier({'audio': t}, SharedEncoder(SIZE, LOOP), {'label': 5}, pooling='token') for t in (placed, bare)
    ]
    source, fresh = (
        made_up(jax.eval_shape(m.init, jax.random.key(0), {'audio': SOUND})['params'], seed=i)
        for i, m in enumerate(models)
    )
    grids = models[0].grids({'audio': SOUND})
    params, report = transfer(
        fresh,
        source,
        tokenizers=models[1].tokenizers,
        source_tokenizers=models[0].tokenizers,
        grids=grids,
        source_grids=grids,
    )
    assert len(report.names(MERGED)) == 2
    close(tokens_of(models[1], params, 'audio', SOUND), tokens_of(models[0], source, 'audio', SOUND))


def test_fixed_positions_have_no_use_for_learned_ones():
    tokenizers = {'video': VideoTokenizer((2, 2, 2)), 'audio': AudioTokenizer((2, 2), positions='learned_space_time')}
    inputs = {'video': np.zeros((2, 2, 6, 6, 3), np.float32), 'audio': SOUND}
    _, _, report = start(tokenizers, inputs)
    assert 'tokenizers_image/positions/table' in report.names(LEFT_OVER)
    # A table over a plane is no sum of one over time and one over frequency.
    assert {'tokenizers_audio/positions/time', 'tokenizers_audio/positions/space'} < set(report.names(KEPT))


@pytest.mark.parametrize('theirs', ['shared', 'separate', 'early'])
@pytest.mark.parametrize('ours', ['MBT', 'shared MBT', *ENCODERS])
def test_every_encoder_starts_from_every_image_autoencoder(ours, theirs):
    image_model, source = image = image_autoencoder(theirs)
    shared = {'MBT': False, 'shared MBT': True}
    if ours in shared:
        encoder = MBT(SIZE, LOOP, fusion_layer=1, shared_weights=shared[ours])
    else:
        encoder = ENCODERS[ours](SIZE, LOOP, **({'fusion_layer': 1} if ours == 'mid' else {}))
    video = PICTURE[:, None]
    tokenizers = {'video': VideoTokenizer((1, 2, 2), **LEARNED), 'audio': AudioTokenizer((2, 2), **LEARNED)}
    model, params, report = start(tokenizers, {'video': video, 'audio': SOUND}, image, encoder)
    kept = {name for name in report.names(KEPT) if not name.startswith('head_')}
    streams_norms = {f'encoder/{m}/norm/{part}' for m in tokenizers for part in ('scale', 'bias')}
    assert kept == {'mid': streams_norms}.get(ours, {'encoder/bottlenecks'} if ours in shared else set())
    assert {name.split('/')[0] for name in report.names(LEFT_OVER)} == {'decoder'}
    layers = source['encoder'][{'separate': 'image', 'early': 'joint'}.get(theirs, theirs)]
    if ours == 'mid':
        for stream, layer, number in (('audio', 'layer_0', 0), ('joint', 'layer_0', 1), ('joint', 'layer_1', 2)):
            jax.tree.map(np.testing.assert_array_equal, params['encoder'][stream][layer], layers[f'layer_{number}'])
        jax.tree.map(np.testing.assert_array_equal, params['encoder']['joint']['norm'], layers['norm'])
    if ours in ENCODERS and ours != 'mid':
        got = model.apply({'params': params}, {'video': video}, method='encode')
        close(got['video'], image_model.apply({'params': source}, {'image': PICTURE}, method='encode')['image'])


def test_a_model_of_images_takes_them_as_they_are():
    image_model, source = image = image_autoencoder()
    model, params, report = start(image_model.tokenizers, {'image': PICTURE}, image, image_model.encoder)
    assert not any(report.names(fate) for fate in (RESIZED, INFLATED, MERGED))
    assert set(report.names(KEPT)) == {'head_label/kernel', 'head_label/bias'}
    got = model.apply({'params': params}, {'image': PICTURE}, method='encode')['image']
    close(got, image_model.apply({'params': source}, {'image': PICTURE}, method='encode')['image'])


def test_the_report_says_what_was_inflated_from_what():
    tokenizers = {'video': VideoTokenizer((3, 2, 2), **KINDS['space and time'])}
    _, _, report = start(tokenizers, {'video': np.zeros((2, 3, 6, 6, 3), np.float32)})
    cells = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in str(report).splitlines()]
    name = 'embedding/kernel'
    assert ['inflated', f'tokenizers_video/{name}', '(36, 8)', f'tokenizers_image/{name}', '(12, 8)'] in cells
    table = 'tokenizers_image/positions/table'
    assert ['inflated', 'tokenizers_video/positions/time', '(1, 8)', table, '(10, 8)'] in cells
    assert '3 inflated, 1 merged with its position' in str(report).splitlines()[-1]


def test_other_patches_and_what_is_not_told_are_refused():
    video = {'video': np.zeros((2, 2, 12, 12, 3), np.float32)}
    # As many values as a tubelet of (2, 2, 2).
    with pytest.raises(ValueError, match=r'video.patch=\(2, 4, 1\) and .* patches of \(2, 2\): .* patch=\(2, 2, 2\)'):
        start({'video': VideoTokenizer((2, 4, 1), **LEARNED)}, video)
    # As many values as a patch of a picture.
    with pytest.raises(ValueError, match=r'audio.patch=\(4, 3\) and .* patches of \(2, 2\)'):
        start({'audio': AudioTokenizer((4, 3), **LEARNED)}, {'audio': np.zeros((2, 12, 12), np.float32)})
    with pytest.raises(ValueError, match="inflation must be one of .* got 'middle'"):
        start({'video': VideoTokenizer((2, 2, 2), **LEARNED)}, video, inflation='middle')
    model, params, _ = start({'video': VideoTokenizer((2, 2, 2), **LEARNED)}, video)
    with pytest.raises(ValueError, match='a stem of video it needs the tokenizers of both models'):
        transfer(params, image_autoencoder()[1])
    given = {'tokenizers': model.tokenizers, 'source_tokenizers': image_autoencoder()[0].tokenizers}
    with pytest.raises(ValueError, match='resizing needs grids'):
        transfer(params, image_autoencoder()[1], **given)


def test_a_model_that_has_a_modality_does_not_look_among_pictures_for_it():
    tokenizers = {'video': VideoTokenizer((2, 2, 2), **LEARNED)}
    clip = {'video': np.zeros((2, 2, 6, 6, 3), np.float32)}
    model, params, _ = start(tokenizers, clip)
    both = {**image_autoencoder()[1], 'tokenizers_video': {'embedding': params['tokenizers_video']['embedding']}}
    fresh = made_up(params, seed=3)
    _, report = transfer(fresh, both, tokenizers=tokenizers)
    assert 'tokenizers_video/embedding/kernel' in report.names(TAKEN)
    assert {'tokenizers_video/class_token', 'tokenizers_video/positions/table'} < set(report.names(KEPT))
