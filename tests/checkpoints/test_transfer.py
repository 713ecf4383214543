"""What a classifier takes from another model; the reference's own cases are in test_reference_transfer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.checkpoints import transfer as transfer_lib
from avmae_jax.checkpoints.transfer import KEPT, LEFT_OVER, RESIZED, TAKEN, transfer
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute, unstack_layers
from avmae_jax.models.bottleneck import MBT
from avmae_jax.models.classifier import Classifier
from avmae_jax.models.decoders import SharedDecoder
from avmae_jax.models.encoders import ENCODERS
from avmae_jax.models.sizes import Size
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer
from avmae_jax.objectives import Objective, Reconstruction

LOOP, SCAN = Compute('float32', scan=False), Compute('float32', scan=True)
SIZE, DECODER_SIZE = Size(8, 2, 16, 3), Size(8, 2, 16, 1)
RANDOM = np.random.default_rng(0)
INPUTS = {
    'video': RANDOM.normal(size=(2, 2, 8, 8, 3)).astype(np.float32),  # 1 x 2 x 2 tokens
    'audio': RANDOM.normal(size=(2, 8, 4)).astype(np.float32),  # 2 x 2 tokens
}
SOUND = {'audio': INPUTS['audio']}


def made_up(shapes, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape) + 0.2, jnp.float32), shapes)


def tokenizers(inputs, channels=1, **fields):
    made = {'video': VideoTokenizer((2, 4, 4), **fields), 'audio': AudioTokenizer((4, 2), **fields, channels=channels)}
    return {m: made[m] for m in inputs}


def autoencoder(encoder, compute=LOOP, inputs=INPUTS, size=SIZE, **fields):
    extra = {'fusion_layer': 1} if encoder == 'mid' else {}
    model = MaskedAutoencoder(
        tokenizers(inputs, **fields), ENCODERS[encoder](size, compute, **extra), SharedDecoder(DECODER_SIZE, compute)
    )
    objective = Objective(dict.fromkeys(inputs, 0.5), {'reconstruction': Reconstruction()})
    masks = objective.draw_masks(jax.random.key(0), model.grids(inputs), batch_size=2)
    return model, made_up(jax.eval_shape(model.init, jax.random.key(0), inputs, masks)['params'], seed=1)


def classifier(compute=LOOP, inputs=INPUTS, channels=1, seed=2, classes=5, token=False, encoder=None, **fields):
    tokens = {'class_token': True, 'class_position': True} if token else {}
    positions = {'positions': fields.pop('positions')} if 'positions' in fields else {}
    fields = {'fusion_layer': 2, **fields}
    model = Classifier(
        tokenizers(inputs, channels, **tokens, **positions),
        encoder or MBT(SIZE, compute, **fields),
        num_classes={'label': classes},
    )
    return model, made_up(jax.eval_shape(model.init, jax.random.key(0), inputs)['params'], seed)


def flat(params):
    return transfer_lib._flatten(unstack_layers(params))


def from_name(name, encoder):
    """The rules in words of this test: from where in the autoencoder a name of the MBT comes, or None."""
    part, *rest = name.split('/')
    if part.startswith('tokenizers_'):
        return name
    if part.startswith('head_') or rest[0] == 'bottlenecks':
        return None
    if rest[0] == 'norm':
        return {'separate': None, 'mid': 'encoder/joint/norm/', 'early': 'encoder/joint/norm/'}.get(
            encoder, 'encoder/shared/norm/'
        ) and '/'.join(
            [*{'mid': ['encoder', 'joint'], 'early': ['encoder', 'joint']}.get(encoder, ['encoder', 'shared']), *rest]
        )
    stream, layer, *leaf = rest
    number = int(layer.removeprefix('layer_'))
    if encoder == 'mid' and number >= 1:
        return '/'.join(['encoder', 'joint', f'layer_{number - 1}', *leaf])
    return '/'.join(['encoder', {'early': 'joint', 'shared': 'shared'}.get(encoder, stream), layer, *leaf])


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('scans', [(LOOP, LOOP), (SCAN, LOOP), (LOOP, SCAN)], ids=['loops', 'from scan', 'to scan'])
@pytest.mark.parametrize('inputs', [INPUTS, SOUND], ids=['both', 'audio'])
def test_a_classifier_starts_from_an_autoencoder(encoder, scans, inputs):
    (_, source), (_, fresh) = autoencoder(encoder, scans[0]), classifier(scans[1], inputs)
    params, report = transfer(fresh, source)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    theirs, before, after = flat(source), flat(fresh), flat(params)
    used = set()
    for name, array in after.items():
        wanted = from_name(name, encoder)
        used |= {wanted} - {None}
        np.testing.assert_array_equal(array, before[name] if wanted is None else theirs[wanted], err_msg=name)
        assert (name in report.names(TAKEN)) == (wanted is not None)
    kept = {'head_label/kernel', 'head_label/bias'}
    kept |= {'encoder/bottlenecks'} if len(inputs) > 1 else set()
    kept |= {'encoder/norm/scale', 'encoder/norm/bias'} if encoder == 'separate' else set()
    assert set(report.names(KEPT)) == kept
    assert set(report.names(LEFT_OVER)) == set(theirs) - used
    assert {name.split('/')[0] for name in theirs if name.startswith('decoder')} <= {
        name.split('/')[0] for name in report.names(LEFT_OVER)
    }


def test_the_autoencoders_own_encoder_is_taken_whole():
    for encoder in ENCODERS:
        source_model, source = autoencoder(encoder)
        model, fresh = classifier(encoder=source_model.encoder)
        params, report = transfer(fresh, source)
        assert set(report.names(KEPT)) == {'head_label/kernel', 'head_label/bias'}
        ours = model.apply({'params': params}, INPUTS, method='encode')
        theirs = source_model.apply({'params': source}, INPUTS, method='encode')
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_from_early_fusion_one_stream_of_all_tokens_computes_what_the_autoencoder_did():
    source_model, source = autoencoder('early')
    model, fresh = classifier(fusion='concatenation', fusion_layer=0, shared_weights=True)
    params, _ = transfer(fresh, source)
    ours = model.apply({'params': params}, INPUTS, method='encode')
    theirs = source_model.apply({'params': source}, INPUTS, method='encode')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_an_mbt_starts_from_an_mbt_without_its_heads_unless_they_are_asked_for():
    (_, source), (_, fresh) = classifier(seed=3), classifier(seed=4, fusion_layer=1)
    params, report = transfer(fresh, source)
    assert set(report.names(KEPT)) == set(report.names(LEFT_OVER)) == {'head_label/kernel', 'head_label/bias'}
    np.testing.assert_array_equal(params['encoder']['bottlenecks'], source['encoder']['bottlenecks'])
    params, report = transfer(fresh, source, heads=True)
    jax.tree.map(np.testing.assert_array_equal, params, source)
    assert not report.names(KEPT) and not report.names(LEFT_OVER)


def test_streams_with_shared_weights_and_with_their_own_start_from_each_other():
    (_, own), (_, shared) = classifier(seed=3), classifier(seed=4, shared_weights=True)
    params, _ = transfer(own, shared)
    for m in INPUTS:
        jax.tree.map(np.testing.assert_array_equal, params['encoder'][m], shared['encoder']['shared'])
    params, _ = transfer(shared, own)
    jax.tree.map(np.testing.assert_array_equal, params['encoder']['shared'], own['encoder']['video'])


def test_a_stem_of_three_channels_gives_the_tokens_of_the_one_it_came_from():
    (_, source), (model, fresh) = autoencoder('shared'), classifier(channels=3)
    params, report = transfer(fresh, source)
    assert report.names(RESIZED) == ['tokenizers_audio/embedding/kernel']
    plain, _ = classifier()
    one = {**params, 'tokenizers_audio': source['tokenizers_audio']}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        model.apply({'params': params}, INPUTS, method='encode'),
        plain.apply({'params': one}, INPUTS, method='encode'),
    )
    tiled, _ = transfer(fresh, source, divide_stem=False)
    kernels = [tree['tokenizers_audio']['embedding']['kernel'] for tree in (tiled, params)]
    np.testing.assert_allclose(kernels[0], 3 * kernels[1], rtol=1e-6)


@pytest.mark.parametrize('token', [False, True])
def test_learned_positions_are_resized_on_their_grid(token):
    longer = {'video': np.zeros((2, 4, 8, 16, 3), np.float32), 'audio': INPUTS['audio']}
    _, source = autoencoder('separate', positions='learned')
    model, fresh = classifier(inputs=longer, positions='learned', token=token)
    grids, source_grids = model.grids(longer), {'video': (1, 2, 2), 'audio': (2, 2)}
    params, report = transfer(fresh, source, grids=grids, source_grids=source_grids)
    old = np.asarray(source['tokenizers_video']['positions']['table']).reshape(2, 2, 8)
    table = np.asarray(params['tokenizers_video']['positions']['table'])
    np.testing.assert_array_equal(table[:token], fresh['tokenizers_video']['positions']['table'][:token])
    new = table[token:].reshape(2, 2, 4, 8)
    # Repeated over the frames that were not there; stretched over the width, from edge to edge.
    np.testing.assert_allclose(new[0], new[1])
    np.testing.assert_allclose(new[0][:, [0, 3]], old, rtol=1e-6)
    np.testing.assert_allclose(new[0][:, 1], old[:, 0] * 2 / 3 + old[:, 1] / 3, rtol=1e-4, atol=1e-6)
    assert 'tokenizers_video/positions/table' in report.names(RESIZED)
    # As many places on another grid are other places.
    turned, _ = transfer(source, source, grids={'audio': (4, 1)}, source_grids=source_grids)
    tables = [tree['tokenizers_audio']['positions']['table'] for tree in (turned, source)]
    assert not np.allclose(*tables)
    with pytest.raises(ValueError, match='positions/table is .* in the start .* needs grids'):
        transfer(fresh, source)


def test_a_deeper_model_keeps_the_layers_that_the_start_does_not_have():
    _, source = autoencoder('separate', size=Size(8, 2, 16, 2))
    _, fresh = classifier()
    params, report = transfer(fresh, source)
    assert 'encoder/video/layer_2/mlp/up/kernel' in report.names(KEPT)
    jax.tree.map(
        np.testing.assert_array_equal, params['encoder']['audio']['layer_2'], fresh['encoder']['audio']['layer_2']
    )


def test_the_report_prints_as_a_table_in_which_layers_share_a_line():
    (_, source), (_, fresh) = autoencoder('mid'), classifier(channels=3)
    lines = str(transfer(fresh, source)[1]).splitlines()
    assert lines[0].split() == ['fate', 'layers', 'parameter', 'shape', 'from', 'of', 'shape']
    cells = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in lines]
    layer, joint = 'encoder/audio/layer_*/mlp/up/kernel', 'encoder/joint/layer_*/mlp/up/kernel'
    assert ['taken', '0', layer, '(8, 16)', layer] in cells
    assert ['taken', '1-2', layer, '(8, 16)', joint] in cells
    assert ['kept at initialisation', 'encoder/bottlenecks', '(4, 8)', '-'] in cells
    stem = 'tokenizers_audio/embedding/kernel'
    assert ['resized', stem, '(24, 8)', stem, '(8, 8)'] in cells
    assert ['left over', '-', 'decoder/filler_video/mask_token', '(8,)'] in cells
    assert lines[-1].endswith('left over.') and '1 resized' in lines[-1]


def test_a_start_that_takes_nothing_or_has_other_sizes_is_an_error():
    _, fresh = classifier()
    with pytest.raises(ValueError, match='Nothing of the start fits the model: it has something/else'):
        transfer(fresh, {'something': {'else': jnp.zeros(3)}})
    _, wider = autoencoder('separate', size=Size(12, 2, 16, 3))
    with pytest.raises(ValueError, match=r'is \(.*\) in the start and \(.*\) in the model: config.model'):
        transfer(fresh, wider)
