"""Our models with the parameters of transformers' compute what transformers computes, class by class.

Sizes are small and odd, and every number is random: norms, biases, tokens, and what the library fixes, as positions.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avmae_jax.models.blocks import Compute
from avmae_jax.objectives import Objective, Reconstruction, Target
from avmae_jax.ops.preprocess import Preprocess
from avmae_jax.structs import Batch, Mask
from avmae_jax.weights import huggingface, huggingface_files, safetensors
from avmae_jax.weights.imported import table
from avmae_jax.weights.table import apply_rows

NEEDED = "is of the extra `interop`: pip install 'avmae_jax[interop]'"
torch = pytest.importorskip('torch', reason=f'torch {NEEDED}')
transformers = pytest.importorskip('transformers', reason=f'transformers {NEEDED}')
torch.set_num_threads(1)

LOOP, SCAN = Compute('float32', scan=False), Compute('float32', scan=True)
TOLERANCE = 1e-4
# With an epsilon that shows wherever it is used, or is not.
COMMON = dict(hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20, layer_norm_eps=1e-2)
PICTURE = COMMON | dict(image_size=15, patch_size=5)
DECODER = dict(
    decoder_hidden_size=8, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=14
)
VIDEO = PICTURE | dict(num_frames=6, tubelet_size=3)
SOUND = COMMON | dict(patch_size=5, max_length=17, num_mel_bins=12, time_stride=4, frequency_stride=3)
NAMES = {'id2label': {0: 'cat', 1: 'dog', 2: 'rain', 3: 'bell', 4: 'drum'}}
CONFIGS = {
    'ViTMAEForPreTraining': ('ViTMAEConfig', PICTURE | DECODER),
    'ViTModel': ('ViTConfig', PICTURE),
    'ViTForImageClassification': ('ViTConfig', PICTURE | NAMES),
    'VideoMAEForPreTraining': ('VideoMAEConfig', VIDEO | DECODER),
    'VideoMAEForVideoClassification': ('VideoMAEConfig', VIDEO | NAMES),
    'ASTModel': ('ASTConfig', SOUND),
    'ASTForAudioClassification': ('ASTConfig', SOUND | NAMES),
}


def made(name, fixed=(), seed=0, **changes):
    """A model of theirs in which every number is random, but for parameters whose names hold one of `fixed`."""
    kind, fields = CONFIGS[name]
    model = getattr(transformers, name)(getattr(transformers, kind)(**{**fields, **changes})).eval()
    if 'decoder_pos_embed' in fixed:
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.data = fixed_table(table.shape[-1])
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if not any(text in part for text in fixed):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
                if 'norm' in part and part.endswith('weight'):
                    parameter.add_(1.0)
    return model


def fixed_table(width):
    """The table of published files, by the library's function; a new model of the library has zeros."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    rows = build_2d_sinusoidal_position_embedding(3, 3, width, cls_token=True)
    return torch.cat([rows[:, width // 2 :], rows[:, : width // 2]], dim=1)[None]


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def read(model, folder, compute=LOOP):
    return huggingface.read(saved(model, folder), compute)


def media(imported, batch=2, seed=3):
    ((modality, shape),) = imported.shapes.items()
    return {modality: np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)}


def theirs_of(inputs):
    """As they take it: colours first."""
    ((modality, x),) = inputs.items()
    return torch.from_numpy(
        {'image': lambda: x.transpose(0, 3, 1, 2), 'video': lambda: x.transpose(0, 1, 4, 2, 3)}.get(
            modality, lambda: x
        )().copy()
    )


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def drawn_mask(num_tokens, num_kept, batch=2):
    """A mask and the noise that makes ViTMAE draw it; kept tokens in any order."""
    noise = np.random.default_rng(5).permuted(np.tile(np.linspace(0, 1, num_tokens), (batch, 1)), axis=1)
    order = np.argsort(noise, axis=1).astype(np.int32)
    return Mask(kept=order[:, :num_kept], hidden=order[:, num_kept:]), torch.from_numpy(noise)


def loss_of(imported, inputs, masks, standardise):
    """The loss by the objective that the source asks for."""
    ((modality, _),) = inputs.items()
    prefix = f'objective.terms.reconstruction.target.{modality}.'
    fields = {name.removeprefix(prefix): x for name, x in imported.settings.items() if name.startswith(prefix)}
    assert fields['standardise'] == standardise
    objective = Objective({modality: 0.5}, {'reconstruction': Reconstruction(target={modality: Target(**fields)})})
    loss, scored = objective(imported.model, imported.params, None, inputs, None, jax.random.key(0), masks=masks)
    return loss, scored.outputs


FIXED = ('position_embeddings', 'decoder_pos_embed')


@pytest.mark.parametrize('fixed, norm_pix_loss', [(FIXED, True), (FIXED, False), ((), False)])
def test_vit_mae_encodes_decodes_and_loses_as_theirs(tmp_path, fixed, norm_pix_loss):
    theirs = made('ViTMAEForPreTraining', fixed, norm_pix_loss=norm_pix_loss, mask_ratio=0.5)
    imported = read(theirs, tmp_path)
    tokenizer, decoder = imported.model.tokenizers['image'], imported.model.decoder
    assert tokenizer.positions == decoder.positions == ('sincos_2d' if fixed else 'learned')
    assert imported.settings['objective.mask_ratio.image'] == 0.5 and imported.settings['image.crop_size'] == 15
    inputs = media(imported)
    mask, noise = drawn_mask(9, 4)
    loss, outputs = loss_of(imported, inputs, {'image': mask}, 'patch' if norm_pix_loss else 'none')
    pixels = theirs_of(inputs)
    wanted = theirs(pixels, noise=noise)
    close(outputs.encoded['image'], theirs.vit(pixels, noise=noise).last_hidden_state)
    close(outputs.predicted['image'], wanted.logits)
    close(loss, wanted.loss)


@pytest.mark.parametrize('norm_pix_loss, use_mean_pooling, qv_bias', [(True, True, True), (False, False, False)])
def test_videomae_encodes_decodes_and_loses_as_theirs(tmp_path, norm_pix_loss, use_mean_pooling, qv_bias):
    theirs = made(
        'VideoMAEForPreTraining', norm_pix_loss=norm_pix_loss, use_mean_pooling=use_mean_pooling, qv_bias=qv_bias
    )
    imported = read(theirs, tmp_path, SCAN)
    inputs = media(imported)
    mask, _ = drawn_mask(18, 7)
    mask = Mask(np.sort(mask.kept, axis=1), np.sort(mask.hidden, axis=1))
    hidden = np.zeros((2, 18), bool)
    np.put_along_axis(hidden, mask.hidden, True, axis=1)
    loss, outputs = loss_of(imported, inputs, {'video': mask}, 'channel' if norm_pix_loss else 'none')
    frames, hidden = theirs_of(inputs), torch.from_numpy(hidden)
    wanted = theirs(frames, bool_masked_pos=hidden)
    close(outputs.encoded['video'], theirs.videomae(frames, bool_masked_pos=hidden).last_hidden_state)
    close(outputs.predicted_hidden['video'], wanted.logits)
    close(loss, wanted.loss)


@pytest.mark.parametrize('use_mean_pooling', [True, False])
def test_the_classifier_of_videomae_scores_as_theirs(tmp_path, use_mean_pooling):
    theirs = made('VideoMAEForVideoClassification', use_mean_pooling=use_mean_pooling)
    imported = read(theirs, tmp_path)
    assert imported.classes == ('cat', 'dog', 'rain', 'bell', 'drum')
    inputs = media(imported)
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.encoded['video'], theirs.videomae(theirs_of(inputs)).last_hidden_state)
    close(scores.averaged['label'], theirs(theirs_of(inputs)).logits)


@pytest.mark.parametrize('hidden_act', ['gelu', 'gelu_pytorch_tanh'])
def test_vit_encodes_and_pools_as_theirs(tmp_path, hidden_act):
    theirs = made('ViTModel', hidden_act=hidden_act, qkv_bias=hidden_act == 'gelu')
    imported = read(theirs, tmp_path)
    inputs, wanted = media(imported), theirs(theirs_of(media(imported)))
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.encoded['image'], wanted.last_hidden_state)
    close(scores.pooled['image'], wanted.pooler_output)
    assert imported.classes is None and not np.any(scores.averaged['label'])


def test_a_vit_without_a_pooler_and_one_with_a_head(tmp_path):
    theirs = made('ViTForImageClassification')
    imported = read(theirs, tmp_path / 'head', SCAN)
    inputs = media(imported)
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.averaged['label'], theirs(theirs_of(inputs)).logits)
    bare = theirs.vit  # As add_pooling_layer=False makes it.
    imported = read(bare, tmp_path / 'bare')
    scores = imported.model.apply({'params': imported.params}, inputs)
    close(scores.pooled['image'], bare(theirs_of(inputs)).last_hidden_state[:, 0])


@pytest.mark.parametrize('name', ['ASTModel', 'ASTForAudioClassification'])
def test_ast_hears_as_theirs_with_its_places_in_our_order(tmp_path, name):
    theirs = made(name)
    imported = read(theirs, tmp_path)
    inputs = media(imported)
    grid = imported.model.tokenizers['audio'].grid((2, 17, 12))
    assert grid == (4, 3)
    scores = imported.model.apply({'params': imported.params}, inputs)
    trunk = theirs if name == 'ASTModel' else theirs.audio_spectrogram_transformer
    wanted = trunk(theirs_of(inputs))
    ours = np.asarray(scores.encoded['audio'])
    places = ours[:, 2:].reshape(2, *grid, -1).swapaxes(1, 2).reshape(2, -1, ours.shape[-1])
    close(np.concatenate([ours[:, :2], places], axis=1), wanted.last_hidden_state)
    if name == 'ASTModel':
        close(scores.pooled['audio'], wanted.pooler_output)
    else:
        close(scores.averaged['label'], theirs(theirs_of(inputs)).logits)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_table_backwards_gives_the_file_back_bit_for_bit(tmp_path, name):
    imported = read(made(name), tmp_path)
    ours = apply_rows(imported.rows, imported.arrays)
    back = apply_rows([row.reverse() for row in imported.rows], ours)
    assert set(back) == set(imported.arrays)
    assert all(np.array_equal(back[part], imported.arrays[part]) for part in back)
    stored = huggingface_files.published_names(safetensors.read(tmp_path / 'model.safetensors'))
    assert all(np.array_equal(back[part], stored[part]) for part in stored) and set(stored) == set(back)
    assert 'none is left over on either side' in table(imported)


def test_fixed_positions_come_back_as_we_compute_them(tmp_path):
    imported = read(made('ViTMAEForPreTraining', FIXED), tmp_path)
    back = apply_rows([row.reverse() for row in imported.rows], apply_rows(imported.rows, imported.arrays))
    assert set(back) == set(imported.arrays)
    for part in ('vit.embeddings.position_embeddings', 'decoder.decoder_pos_embed'):
        np.testing.assert_allclose(back[part], imported.arrays[part], atol=1e-6)


@pytest.mark.parametrize('name', CONFIGS)
def test_names_in_memory_and_in_files_are_the_same_model(tmp_path, name):
    theirs = made(name)
    stored = huggingface_files.published_names(safetensors.read(saved(theirs, tmp_path) / 'model.safetensors'))
    memory = huggingface_files.published_names({part: x.numpy() for part, x in theirs.state_dict().items()})
    assert set(stored) == set(memory) and all(np.array_equal(stored[part], memory[part]) for part in stored)


def test_a_bias_on_keys_changes_nothing(tmp_path):
    imported = read(made('VideoMAEForVideoClassification'), tmp_path)
    inputs = media(imported)
    wanted = imported.model.apply({'params': imported.params}, inputs).averaged['label']
    params = jax.tree.map(jnp.array, imported.params)
    for layer in params['encoder']['shared'].values():
        if 'attention' in layer:
            bias = layer['attention']['qkv']['bias'].reshape(3, 3, 4)  # Heads; query, key, value; channels.
            assert not np.any(bias[:, 1])
            layer['attention']['qkv']['bias'] = bias.at[:, 1].set(7.0).reshape(-1)
    got = imported.model.apply({'params': params}, inputs).averaged['label']
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_shards_and_their_index_are_one_file(tmp_path):
    theirs = made('ViTModel')
    theirs.save_pretrained(tmp_path, max_shard_size='5KB')
    shards = sorted(path.name for path in tmp_path.glob('*.safetensors'))
    assert len(shards) > 1
    imported = huggingface.read(tmp_path, LOOP)
    whole = read(theirs, tmp_path / 'whole')
    jax.tree.map(np.testing.assert_array_equal, imported.params, whole.params)
    index = tmp_path / huggingface_files.INDEX_FILE
    content = json.loads(index.read_text())
    name = sorted(content['weight_map'])[0]
    for change, complaint in (
        ({name: '../elsewhere.safetensors'}, 'no file'),
        ({'more': shards[0]}, 'names more, which its files do not hold'),
        ({name: shards[0] if content['weight_map'][name] != shards[0] else shards[1]}, 'says otherwise'),
    ):
        index.write_text(json.dumps({'weight_map': {**content['weight_map'], **change}}))
        with pytest.raises(ValueError, match=complaint):
            huggingface.read(tmp_path, LOOP)
    (tmp_path / shards[0]).unlink()
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=shards[0]):
        huggingface.read(tmp_path, LOOP)


def test_what_is_no_such_model_is_refused(tmp_path):
    folder = saved(made('ASTForAudioClassification'), tmp_path / 'ast')
    arrays = safetensors.read(folder / 'model.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    for name, (changes, change_arrays, complaint) in {
        'class': ({'architectures': ['BertModel']}, {}, r"architectures is \['BertModel'\]"),
        'classes': ({'architectures': [['x']]}, {}, r"config.json: architectures is \[\['x'\]\]"),
        'epsilon': ({'layer_norm_eps': float('nan')}, {}, 'config.json: layer_norm_eps is nan, where a number, 0 or'),
        'negative': ({'layer_norm_eps': -1e-6}, {}, 'layer_norm_eps is -1e-06'),
        'much': ({'more': 'x' * huggingface_files.MAX_JSON_BYTES}, {}, 'config.json has 16,.* bytes, and at most'),
        'type': ({'model_type': 'vit'}, {}, "model_type is 'vit'"),
        'act': ({'hidden_act': 'relu'}, {}, "hidden_act is 'relu'"),
        'size': ({'hidden_size': -12}, {}, 'hidden_size is -12'),
        'word': ({'hidden_size': 'many'}, {}, "hidden_size is 'many'"),
        'heads': ({'num_attention_heads': 5}, {}, 'width must be a multiple of num_heads'),
        'layers': ({'num_hidden_layers': 2}, {}, 'there are 3 layers .* there would be 2'),
        'many': ({'num_hidden_layers': 1000000}, {}, 'there would be 1000000'),
        'long': ({'max_length': 1000000}, {}, r'position_embeddings is \(1, 14, 12\), and by config.json it would be'),
        'wide': ({'hidden_size': 99999}, {}, r'projection.weight is \(12, 1, 5, 5\), and by config.json'),
        'labels': ({'id2label': {'0': 'cat'}}, {}, 'names 1 classes, and the head has 5'),
        'extra': ({}, {'extra': np.zeros(2, np.float32)}, 'no rule takes them: extra'),
        'missing': ({}, {'classifier.dense.weight': None}, 'nothing was given for them: head_label/kernel'),
        'shape': ({}, {'classifier.layernorm.weight': np.ones(5, np.float32)}, 'Shapes do not fit'),
    }.items():
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        (broken / 'config.json').write_text(json.dumps({**config, **changes}))
        changed = {part: x for part, x in {**arrays, **change_arrays}.items() if x is not None}
        safetensors.write(broken / 'model.safetensors', changed)
        with pytest.raises(ValueError, match=complaint) as caught:
            huggingface.read(broken, LOOP)
        assert str(broken) in str(caught.value)
    with pytest.raises(ValueError, match='config.json is not there'):
        huggingface.read(tmp_path / 'nowhere', LOOP)


@pytest.mark.parametrize(
    'name', ['ViTMAEForPreTraining', 'VideoMAEForVideoClassification', 'ASTForAudioClassification']
)
def test_whatever_the_json_says_a_model_is_read_or_refused(
    tmp_path, broken_json, read_once, assert_read_or_refused, name
):
    made(name).save_pretrained(tmp_path, max_shard_size='9KB')
    known = {*huggingface_files.DEFAULTS[huggingface.KINDS[name].model_type], 'architectures', 'model_type', 'id2label'}
    read = functools.partial(huggingface.read, tmp_path, LOOP)
    contents = {'config.json': json.loads((tmp_path / 'config.json').read_text())}
    contents['config.json'] = {key: value for key, value in contents['config.json'].items() if key in known}
    contents['preprocessor_config.json'] = {
        'do_normalize': True, 'mean': -3.0, 'std': 2.0, 'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6],
    }  # fmt: skip
    if name == 'ViTMAEForPreTraining':  # Of one array as of the others.
        contents[huggingface_files.INDEX_FILE] = json.loads((tmp_path / huggingface_files.INDEX_FILE).read_text())
        del contents[huggingface_files.INDEX_FILE]['metadata']
    for file, content in contents.items():
        loads = 0
        for where, text in broken_json(content):
            (tmp_path / file).write_text(text, 'latin-1')
            loads += assert_read_or_refused(read, tmp_path, f'{file}: {where}')
        assert loads or file == huggingface_files.INDEX_FILE
        (tmp_path / file).write_text(json.dumps(content))
        assert assert_read_or_refused(read, tmp_path, 'whole')


def test_the_preprocessor_says_how_pixels_and_sound_were_normalised(tmp_path):
    image = saved(made('ViTModel'), tmp_path / 'image')
    # As the library writes it; its own class needs torchvision.
    said = {'do_normalize': True, 'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6], 'size': {'height': 15}}
    (image / 'preprocessor_config.json').write_text(json.dumps(said))
    settings = huggingface.read(image, LOOP).settings
    assert settings['preprocess.rgb_mean'] == [0.1, 0.2, 0.3] and settings['preprocess.rgb_std'] == [0.4, 0.5, 0.6]
    for changes, complaint in (
        ({'image_mean': 0.5}, 'image_mean is 0.5, where a list of three numbers was due'),
        ({'image_std': [0.4, 'x', 0.5]}, 'image_std is .*where a list of three numbers'),
        ({'image_std': [0.4, 0.0, 0.5]}, 'image_std is .*above 0'),
    ):
        (image / 'preprocessor_config.json').write_text(json.dumps(said | changes))
        with pytest.raises(ValueError, match=f'preprocessor_config.json: {complaint}'):
            huggingface.read(image, LOOP)
    (image / 'preprocessor_config.json').unlink()
    (image / 'preprocessor_config.json').mkdir()
    with pytest.raises(ValueError, match='preprocessor_config.json is no file'):
        huggingface.read(image, LOOP)
    sound = saved(made('ASTModel'), tmp_path / 'sound')
    transformers.ASTFeatureExtractor(mean=-3.0, std=2.0, num_mel_bins=12, max_length=17).save_pretrained(sound)
    settings = huggingface.read(sound, LOOP).settings
    assert (settings['preprocess.audio_mean'], settings['preprocess.audio_std']) == (-3.0, 4.0)
    assert settings['preprocess.convention'] == 'kaldi' and settings['preprocess.num_spec_frames'] == 17


def test_sound_is_prepared_as_by_the_feature_extractor(tmp_path):
    """From int16 to the normalised log-mel, with the frames that fill it up."""
    folder = saved(made('ASTModel', num_mel_bins=32, max_length=60), tmp_path)
    extractor = transformers.ASTFeatureExtractor(mean=-3.0, std=2.0, num_mel_bins=32, max_length=60)
    extractor.save_pretrained(folder)
    settings = huggingface.read(folder, LOOP).settings
    preprocess = Preprocess(**{name.removeprefix('preprocess.'): value for name, value in settings.items()})
    sound = (2000 * np.random.default_rng(0).normal(size=8000)).astype(np.int16)
    one = np.ones(1, np.float32)
    batch = Batch(
        {'audio': sound[None]}, {'audio': one > 0}, {}, one.astype(np.int32), np.zeros((1, 2), np.uint32), one, one
    )
    theirs = extractor(sound.astype(np.float32) / 32768, sampling_rate=16_000, return_tensors='np')['input_values']
    ours = preprocess(batch, train=False)['audio']
    assert ours.shape == (1, 60, 32)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
