"""Our models with the parameters of published PyTorch models compute what those compute, project by project."""

import numpy as np
import pytest

from avmae_jax import convert, experiment, settings
from avmae_jax.models.autoencoder import MaskedAutoencoder
from avmae_jax.models.blocks import Compute
from avmae_jax.structs import Mask
from avmae_jax.weights.formats import FORMATS
from avmae_jax.weights.imported import table
from avmae_jax.weights.table import apply_rows, flatten
from configs.finetune import audioset as finetune_audioset
from configs.pretrain import audioset as pretrain_audioset

torch = pytest.importorskip('torch', reason="torch is of the extra `interop`: pip install 'avmae_jax[interop]'")
from tests.weights import torch_models as theirs  # noqa: E402  It imports torch.

LOOP, SCAN = Compute('float32', scan=False), Compute('float32', scan=True)
TOLERANCE = 1e-4
HEADS = {'num_heads': '3'}
BOTH_HEADS = {**HEADS, 'decoder_num_heads': '2'}


def sincos_2d(rows, columns, width):
    """The fixed table of the image MAE, with zeros for the class token: half of the channels for the column."""
    frequency = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    parts = [f(place[:, None] * frequency) for place in (column, row) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.pad(np.concatenate(parts, 1), ((1, 0), (0, 0)))[None].astype(np.float32))


def read(kind, model, folder, given, compute=LOOP, wrap=lambda state: {'model': state}):
    """The model of ours; its settings must make it again, and the table must give back their arrays."""
    torch.save(wrap(model.state_dict()), folder / 'weights.pth')
    imported = FORMATS[kind].read(folder / 'weights.pth', compute, given)
    if isinstance(imported.model, MaskedAutoencoder):
        assert experiment.build_model({'model': experiment.describe_model(imported.model)}) == imported.model
    if not compute.scan:
        back = apply_rows([row.reverse() for row in imported.rows], flat(imported))
        state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in imported.ignored}
        assert set(back) == set(state)
        assert all(back[name].shape == state[name].shape for name in state)
        fixed = [name for row in imported.rows if not row.target for name in row.source]
        assert all(np.array_equal(back[name], state[name]) for name in state if name not in fixed)
    return imported


def flat(imported):
    return {name: np.asarray(array) for name, array in flatten(imported.params).items()}


def drawn(modality, shape, batch=2, seed=1):
    return {modality: np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)}


def drawn_mask(num_tokens, num_kept, batch=2, ascending=False):
    order = np.random.default_rng(5).permuted(np.tile(np.arange(num_tokens, dtype=np.int32), (batch, 1)), axis=1)
    kept, hidden = order[:, :num_kept], order[:, num_kept:]
    return Mask(np.sort(kept, 1), np.sort(hidden, 1)) if ascending else Mask(kept, hidden)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array, np.int64)) for array in arrays]


def close(ours, wanted):
    np.testing.assert_allclose(np.asarray(ours), wanted.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


# -- MAE, AudioMAE --

# Format, modality, shape, patch, colours, grid, what is told.
MAES = {
    'mae': ('image', (15, 10, 3), (5, 5), 3, (3, 2), {'image': '15x10'}),
    'audiomae': ('audio', (20, 8), (4, 4), 1, (5, 2), {'num_mel_bins': '8'}),
}


def as_theirs(modality, x):
    """Colours first."""
    x = torch.from_numpy(x)
    return x[:, None] if modality == 'audio' else x.movedim(-1, 1)


@pytest.mark.parametrize('positions, compute', [('fixed', LOOP), ('learned', SCAN)])
@pytest.mark.parametrize('kind', MAES)
def test_an_mae_encodes_and_decodes_as_theirs(tmp_path, kind, positions, compute):
    modality, shape, patch, channels, grid, given = MAES[kind]
    num_tokens = grid[0] * grid[1]
    model = theirs.randomised(theirs.MAE(num_tokens, patch, channels), small=('patch_', 'cls_', 'pos_'))
    if positions == 'fixed':
        with torch.no_grad():
            model.pos_embed.copy_(sincos_2d(*grid, 12))
            model.decoder_pos_embed.copy_(sincos_2d(*grid, 8))
    imported = read(kind, model, tmp_path, {**given, **BOTH_HEADS}, compute)
    tokenizer = imported.model.tokenizers[modality]
    assert tokenizer.positions == imported.model.decoder.positions == {'fixed': 'sincos_2d'}.get(positions, positions)
    assert imported.shapes == {modality: shape}
    inputs, mask = drawn(modality, shape), drawn_mask(num_tokens, 3)
    outputs = imported.model.apply({'params': imported.params}, inputs, {modality: mask})
    x = as_theirs(modality, inputs[modality])
    close(outputs.encoded[modality], model.encode(x, *tensors(mask.kept)))
    close(outputs.predicted[modality], model(x, *tensors(mask.kept, mask.hidden)))


@pytest.mark.parametrize('mean', [True, False])
@pytest.mark.parametrize('kind', MAES)
def test_a_finetuned_mae_scores_as_theirs(tmp_path, kind, mean):
    modality, shape, patch, channels, grid, given = MAES[kind]
    model = theirs.randomised(theirs.MAEClassifier(grid[0] * grid[1], patch, channels, mean))
    imported = read(kind, model, tmp_path, {**given, **HEADS})
    assert imported.classes == () and imported.model.num_classes == {'label': 5}
    inputs = drawn(modality, shape)
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.averaged['label'], model(as_theirs(modality, inputs[modality])))


ENCODER = ('patch_embed', 'cls_token', 'pos_embed', 'blocks', 'norm')


def test_an_encoder_of_mae_alone_gets_a_head_that_says_nothing(tmp_path):
    modality, shape, patch, channels, grid, given = MAES['mae']
    model = theirs.randomised(theirs.MAE(grid[0] * grid[1], patch, channels))
    state = {name: x for name, x in model.state_dict().items() if name.startswith(ENCODER)}
    torch.save({'model': state}, tmp_path / 'weights.pth')
    imported = FORMATS['mae'].read(tmp_path / 'weights.pth', LOOP, {**given, **HEADS})
    assert imported.classes is None
    inputs = drawn(modality, shape)
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.encoded[modality], model.encode(as_theirs(modality, inputs[modality])))
    assert not np.any(scores.averaged['label'])


def test_of_an_audiomae_with_shifting_windows_the_encoder_is_read_and_the_rest_named(tmp_path):
    modality, shape, patch, channels, grid, given = MAES['audiomae']
    model = theirs.randomised(theirs.MAE(grid[0] * grid[1], patch, channels))
    swin = {f'decoder_blocks.{i}.attn.meta_mlp.fc1.weight': torch.randn(4, 2) for i in range(3)}
    torch.save({'model': model.state_dict() | swin}, tmp_path / 'weights.pth')
    imported = FORMATS['audiomae'].read(tmp_path / 'weights.pth', LOOP, {**given, **HEADS})
    assert imported.ignored.keys() == swin.keys() | {n for n in model.state_dict() if not n.startswith(ENCODER)}
    line = 'decoder_blocks.*.attn.meta_mlp.fc1.weight is ignored: its decoder attends within shifting windows'
    assert sum(text.startswith(line) for text in table(imported).splitlines()) == 1
    inputs = drawn(modality, shape)
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.encoded[modality], model.encode(as_theirs(modality, inputs[modality])))


# -- VideoMAE --

VIDEO = {'video': '6x10x8'}


def test_videomae_encodes_and_decodes_as_theirs(tmp_path):
    model = theirs.randomised(theirs.VideoMAE((3, 5, 4)))
    imported = read('videomae', model, tmp_path, {**VIDEO, **BOTH_HEADS})
    inputs, mask = drawn('video', (6, 10, 8, 3)), drawn_mask(8, 3, ascending=True)
    outputs = imported.model.apply({'params': imported.params}, inputs, {'video': mask})
    x = as_theirs('video', inputs['video'])
    close(outputs.encoded['video'], model.encoder(x, *tensors(mask.kept)))
    close(outputs.predicted_hidden['video'], model(x, *tensors(mask.kept, mask.hidden)))


@pytest.mark.parametrize('mean', [True, False])
def test_a_finetuned_videomae_scores_as_theirs(tmp_path, mean):
    model = theirs.randomised(theirs.VideoMAEClassifier((3, 5, 4), mean))
    imported = read('videomae', model, tmp_path, {**VIDEO, **HEADS}, wrap=lambda state: {'module': state})
    inputs = drawn('video', (6, 10, 8, 3))
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.averaged['label'], model(as_theirs('video', inputs['video'])))


def test_a_videomae_v2_of_cosine_attention_is_refused(tmp_path):
    state = theirs.randomised(theirs.VideoMAEClassifier((3, 5, 4), True)).state_dict()
    torch.save({**state, 'blocks.0.attn.scale': torch.ones(3, 1, 1)}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='weights.pth: .*no rule takes them: blocks.0.attn.scale'):
        FORMATS['videomae'].read(tmp_path / 'weights.pth', LOOP, {**VIDEO, **HEADS})


# -- AST, SSAST --


def parallel(state):
    """As DataParallel saves it."""
    return {f'module.{name}': tensor for name, tensor in state.items()}


# 17 x 12 bins (time, mel), patches of 5 x 4: their axes are (mel, time).
@pytest.mark.parametrize('stride, places', [((3, 3), 5 * 3), ((2, 4), 4 * 5), ((4, 5), 3 * 3)])
def test_ast_scores_as_theirs(tmp_path, stride, places):
    model = theirs.randomised(theirs.AST(places, patch=(4, 5), stride=stride))
    given = {'audio': '17x12', 'stride': f'{stride[1]}x{stride[0]}', **HEADS}
    imported = read('ast', model, tmp_path, given, wrap=parallel)
    tokenizer = imported.model.tokenizers['audio']
    assert tokenizer.stride == (None if stride == (4, 5) else stride[::-1]) and tokenizer.patch == (5, 4)
    assert {name.split('.')[1] for name in imported.ignored} == {'head', 'head_dist'}
    inputs = drawn('audio', (17, 12))
    scores = imported.model.apply({'params': imported.params}, inputs)
    x = torch.from_numpy(inputs['audio'])
    # Behind the tokens in front theirs runs over frequency first, ours over time first.
    (frequencies, times), tokens = tokenizer.grid((1, 17, 12))[::-1], model.v(x)
    close(scores.encoded['audio'][:, :2], tokens[:, :2])
    close(
        scores.encoded['audio'][:, 2:], tokens[:, 2:].unflatten(1, (frequencies, times)).transpose(1, 2).flatten(1, 2)
    )
    close(scores.averaged['label'], model(x))


def test_the_stride_of_the_published_ast_follows_from_its_positions():
    from avmae_jax.weights.torch_ast import stride_of

    for places, stride in [(1212, 10), (850, 12), (657, 14), (512, 16)]:
        assert stride_of(places, (1024, 128), (16, 16), {}, pretrained=False) == (stride, stride)
    assert stride_of(512, (1024, 128), (2, 128), {}, pretrained=True) == (2, 128)
    assert stride_of(1023, (1024, 128), (2, 128), {'stride': '1x128'}, pretrained=False) == (1, 128)
    for places, given, complaint in [(1000, {}, 'no stride explains'), (1212, {'stride': '12'}, 'no stride explains')]:
        with pytest.raises(ValueError, match=f'v.pos_embed has {places} places for 1024x128 .*{complaint}'):
            stride_of(places, (1024, 128), (16, 16), given, pretrained=False)


@pytest.mark.parametrize('pooling, distilled', [('mean', True), ('token', False)])
def test_a_finetuned_ssast_scores_as_theirs(tmp_path, pooling, distilled):
    model = theirs.randomised(theirs.AST(15, (4, 5), (3, 3), distilled, mean=pooling == 'mean'), small=('v.norm',))
    given = {'audio': '17x12', 'stride': '3', 'pooling': pooling, **HEADS}
    imported = read('ssast', model, tmp_path, given, wrap=parallel)
    inputs = drawn('audio', (17, 12))
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.averaged['label'], model(torch.from_numpy(inputs['audio'])))


def test_the_encoder_of_a_pretrained_ssast_encodes_as_theirs(tmp_path):
    model = theirs.randomised(theirs.SSAST(9, (4, 5), shape=(17, 12)))
    torch.save(parallel(model.state_dict()), tmp_path / 'weights.pth')
    imported = FORMATS['ssast'].read(tmp_path / 'weights.pth', LOOP, HEADS)
    assert imported.shapes == {'audio': (17, 12)} and imported.classes is None
    assert 'mask_embed' in imported.ignored and 'gpredlayer.2.bias' in imported.ignored
    inputs = drawn('audio', (17, 12))
    scores = imported.model.apply({'params': imported.params}, inputs)
    tokens = model.v(torch.from_numpy(inputs['audio']))
    close(scores.encoded['audio'][:, :2], tokens[:, :2])
    close(scores.encoded['audio'][:, 2:].mean(1), tokens[:, 2:].mean(1))


# -- CAV-MAE --

CAV_SHAPES = {'image': (15, 10, 3), 'audio': (20, 9)}
CAV_PLACES, CAV_PATCH = {'a': 5 * 3, 'v': 3 * 2}, {'a': (3, 4), 'v': (5, 5)}  # A patch of sound is (mel, time).
CAV_GIVEN = {'image': '15x10', 'num_mel_bins': '9'}
LETTERS = {'image': 'v', 'audio': 'a'}


def cav_inputs(seed=1):
    """Ours, and theirs in their order."""
    ours = {m: drawn(m, shape, seed=seed)[m] for m, shape in CAV_SHAPES.items()}
    return ours, {'a': torch.from_numpy(ours['audio']), 'v': as_theirs('image', ours['image'])}


def turned(index):
    """Places of sound in ours (5 moments x 3 bands, time first) -> the same in theirs, frequency first."""
    moment, band = np.divmod(index, 3)
    return band * 5 + moment


def in_our_order(x):
    return x[:, turned(np.arange(15))]


def test_cavmae_encodes_and_decodes_as_theirs(tmp_path):
    model = theirs.randomised(theirs.CAVMAE(CAV_PLACES, CAV_PATCH))
    imported = read('cavmae', model, tmp_path, {**CAV_GIVEN, **BOTH_HEADS}, wrap=parallel)
    assert imported.shapes == CAV_SHAPES
    ours, x = cav_inputs()
    masks = {'image': drawn_mask(6, 2), 'audio': drawn_mask(15, 4)}
    kept = {'a': turned(masks['audio'].kept), 'v': masks['image'].kept}
    hidden = {'a': turned(masks['audio'].hidden), 'v': masks['image'].hidden}
    kept, hidden = ({m: tensors(x)[0] for m, x in part.items()} for part in (kept, hidden))
    outputs = imported.model.apply({'params': imported.params}, ours, masks)
    encoded, predicted = model.encode(x, kept), model(x, kept, hidden)
    for modality, letter in LETTERS.items():
        close(outputs.encoded[modality], encoded[letter])
    close(outputs.predicted['image'], predicted['v'])
    # The values of a patch change places, too: (mel, time) in theirs.
    values = in_our_order(predicted['a']).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)
    close(outputs.predicted['audio'], values)
    for modality, letter in LETTERS.items():
        # A modality alone goes through norms of its own.
        alone = imported.model.apply({'params': imported.params}, {modality: ours[modality]}, method='encode')
        wanted = model.encode({letter: x[letter]})[letter]
        close(alone[modality], in_our_order(wanted) if modality == 'audio' else wanted)


def test_a_finetuned_cavmae_scores_as_theirs_with_both_modalities_and_with_one(tmp_path):
    small = ('patch_embed', 'pos_embed', 'modality', 'norm')
    model = theirs.randomised(theirs.CAVMAE(CAV_PLACES, CAV_PATCH, classes=5), small=small)
    imported = read('cavmae', model, tmp_path, {**CAV_GIVEN, **HEADS}, wrap=parallel)
    ours, x = cav_inputs()
    for modalities in (['image', 'audio'], ['audio'], ['image']):
        scores = imported.model.apply({'params': imported.params}, {m: ours[m] for m in modalities})
        close(scores.averaged['label'], model.classify({LETTERS[m]: x[LETTERS[m]] for m in modalities}))


def test_modalities_that_have_grown_apart_are_no_cavmae_again(tmp_path):
    model = theirs.randomised(theirs.CAVMAE(CAV_PLACES, CAV_PATCH))
    imported = read('cavmae', model, tmp_path, {**CAV_GIVEN, **BOTH_HEADS})
    ours = flat(imported)
    ours['decoder/filler_audio/mask_token'] = ours['decoder/filler_audio/mask_token'] + 1
    with pytest.raises(ValueError, match='mask_token.*they have grown apart'):
        apply_rows([row.reverse() for row in imported.rows], ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    'recipe, arguments, classes', [(pretrain_audioset, '', 0), (finetune_audioset, ',mixup=mixup', 5)]
)
def test_a_cavmae_becomes_a_run(tmp_path, recipe, arguments, classes):
    model = theirs.randomised(theirs.CAVMAE({**CAV_PLACES, 'v': 9}, CAV_PATCH, classes))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    config = recipe.get_config(f'size=Ti,modalities=image+audio{arguments}')
    small = {'image.short_side': 15, 'image.crop_size': 15, 'data.num_workers': 0, 'model.compute.dtype': 'float32'}
    config.update_from_flattened_dict({**small, 'batch_size': 8})
    given = {'num_mel_bins': '9', **(HEADS if classes else BOTH_HEADS)}
    convert.convert('cavmae', tmp_path / 'weights.pth', tmp_path / 'run', settings.to_plain(config), given=given)
    restored = experiment.restore_model(tmp_path / 'run')
    audio = drawn('audio', CAV_SHAPES['audio'])
    alone = restored.model.apply({'params': restored.params}, audio, method='encode')
    close(alone['audio'], in_our_order(model.encode({'a': torch.from_numpy(audio['audio'])})['a']))


# -- What does not fit --

# Format -> its model and what is told.
PROJECTS = {
    'mae': lambda: (theirs.MAE(6, (5, 5), 3), {'image': '15x10', **BOTH_HEADS}),
    'audiomae': lambda: (theirs.MAE(10, (4, 4), 1), {'num_mel_bins': '8', **BOTH_HEADS}),
    'videomae': lambda: (theirs.VideoMAE((3, 5, 4)), {**VIDEO, **BOTH_HEADS}),
    'cavmae': lambda: (theirs.CAVMAE(CAV_PLACES, CAV_PATCH), {**CAV_GIVEN, **BOTH_HEADS}),
    'ast': lambda: (theirs.AST(15, (4, 5), (3, 3)), {'audio': '17x12', 'stride': '3', **HEADS}),
    'ssast': lambda: (theirs.SSAST(9, (4, 5), shape=(17, 12)), HEADS),
}


@pytest.mark.parametrize('kind', PROJECTS)
def test_arrays_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path, kind):
    from safetensors.torch import save_file

    model, given = PROJECTS[kind]()
    state, path = theirs.randomised(model).state_dict(), tmp_path / 'weights.safetensors'
    block = next(name for name in state if name.endswith('1.mlp.fc2.weight'))
    save_file(state, path)
    FORMATS[kind].read(path, LOOP, given)
    for changed, complaint in [
        ({**state, 'blocks.9.extra': torch.ones(2)}, 'no rule takes them: blocks.9.extra'),
        (
            {name: x for name, x in state.items() if name != block},
            'nothing was given for them: .*layer_1/mlp/down/kern',
        ),
        ({**state, block: state[block][:, 1:].clone()}, 'layer_1/mlp/down/kernel'),
        ({**state, block: state[block].double()}, f'{block} are no arrays of float32'),
        ({**state, block: state[block] * torch.nan}, f'{block} holds numbers that are not finite'),
    ]:
        save_file(changed, path)
        with pytest.raises(ValueError, match=f'weights.safetensors: .*{complaint}'):
            FORMATS[kind].read(path, LOOP, given)
    save_file({'other': torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r'weights.safetensors: \S+ is missing; there are other'):
        FORMATS[kind].read(path, LOOP, given)


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    torch.save(theirs.randomised(theirs.MAE(4, (5, 5), 3)).state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(
        ValueError, match='how many heads a width of 12 has is not known: give --given=num_heads=NUMBER'
    ):
        FORMATS['mae'].read(tmp_path / 'weights.pth', LOOP, {})
    with pytest.raises(ValueError, match='--given=num_heads=no is no number'):
        FORMATS['mae'].read(tmp_path / 'weights.pth', LOOP, {'num_heads': 'no'})
    with pytest.raises(ValueError, match='width must be a multiple of num_heads'):
        FORMATS['mae'].read(tmp_path / 'weights.pth', LOOP, {'num_heads': '5', 'decoder_num_heads': '2'})
