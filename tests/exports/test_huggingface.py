"""What `transformers` loads of an export says what our model says; what it has no class for is refused by the field."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

torch = pytest.importorskip('torch', reason="needs pip install 'avmae_jax[interop]'")
transformers = pytest.importorskip('transformers', reason="needs pip install 'avmae_jax[interop]'")

from avmae_jax import export  # noqa: E402
from avmae_jax.data.schema import DatasetInfo, LabelSet, MediaSettings  # noqa: E402
from avmae_jax.data.views import AudioView, ImageView, VideoView, View  # noqa: E402
from avmae_jax.exports import functions, huggingface  # noqa: E402
from avmae_jax.exports.trained import Trained  # noqa: E402
from avmae_jax.models.autoencoder import MaskedAutoencoder  # noqa: E402
from avmae_jax.models.blocks import Compute  # noqa: E402
from avmae_jax.models.bottleneck import MBT  # noqa: E402
from avmae_jax.models.classifier import Classifier  # noqa: E402
from avmae_jax.models.decoders import SharedDecoder  # noqa: E402
from avmae_jax.models.encoders import EarlyEncoder, MidEncoder, SeparateEncoder, SharedEncoder  # noqa: E402
from avmae_jax.models.sizes import Architecture, Size  # noqa: E402
from avmae_jax.models.tokenizers import AudioTokenizer, ImageTokenizer, VideoTokenizer  # noqa: E402
from avmae_jax.objectives import Objective, Reconstruction  # noqa: E402
from avmae_jax.ops.preprocess import Preprocess  # noqa: E402
from avmae_jax.structs import JOINT_ORDER, Mask  # noqa: E402
from avmae_jax.weights import huggingface as tables  # noqa: E402
from avmae_jax.weights import huggingface_files  # noqa: E402
from avmae_jax.weights.table import flatten  # noqa: E402
from tests.weights import test_huggingface as published  # noqa: E402

torch.set_num_threads(1)
COMPUTE = Compute('float32', scan=False)
SIZE = Size(24, 3, 40, 2)
EXACT = Size(24, 2, 28, 2, Architecture('exact', 1e-4))
VIEWS = {'video': VideoView(4, 0.1, 10, 10), 'audio': AudioView(0.2), 'image': ImageView(10, 10)}
SHAPES = {'video': (4, 10, 10, 3), 'audio': (17, 12), 'image': (10, 10, 3)}
NAMES = ('cat', 'dog', 'rain', 'bell', 'drum')
INFO = DatasetInfo(
    'made up', ('audio', 'video'), MediaSettings(None, 0.0, 0, 0, 16_000, None, 0), {},
    {'label': LabelSet(NAMES, False)}, {},
)  # fmt: skip
VIDEO, AUDIO, IMAGE = VideoTokenizer((2, 5, 5)), AudioTokenizer((5, 5)), ImageTokenizer((5, 5))
FRONT = dict(class_token=True, distillation_token=True, modality_token=True)


def make_trained(model, seed=0):
    shapes = {m: SHAPES[m] for m in JOINT_ORDER if m in model.tokenizers}
    inputs = {m: np.zeros((1, *shape), np.float32) for m, shape in shapes.items()}
    arguments, objective = (inputs,), None
    if isinstance(model, MaskedAutoencoder):
        objective = Objective(dict.fromkeys(shapes, 0.5), {'reconstruction': Reconstruction()})
        arguments = (inputs, objective.draw_masks(jax.random.key(0), model.grids(inputs), 1))
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)['params']
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), params)
    preprocess = Preprocess(
        convention='kaldi',
        num_mel_bins=12,
        num_spec_frames=17,
        audio_mean=-4.0,
        audio_std=3.0,
        rgb_mean=(0.4, 0.5, 0.6),
    )
    view = View(**{m: VIEWS[m] for m in shapes})
    about = {'step': 7, 'trained_on': '', 'averaged': False, 'averaged_steps': [7]}
    return Trained(model, params, objective, view, preprocess, INFO, shapes, {}, about)


def some(names, quick):
    """All of the names; those that are not quick for `-m slow`."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def autoencoder(encoder, tokenizers, **decoder):
    return MaskedAutoencoder(tokenizers, encoder, SharedDecoder(Size(8, 2, 12, 1), COMPUTE, **decoder))


def classifier(encoder, tokenizers, **fields):
    return Classifier(tokenizers, encoder, num_classes={'label': 5}, **fields)


BOTH = {'video': VIDEO.clone(modality_token=True), 'audio': AUDIO.clone(**FRONT)}
EXPECTED = {
    'VideoMAEModel': (autoencoder(EarlyEncoder(SIZE, COMPUTE), BOTH), 'video'),
    'VideoMAEModel, separate': (autoencoder(SeparateEncoder(EXACT, COMPUTE, final_norm=False), BOTH), 'video'),
    'ASTModel': (autoencoder(SharedEncoder(SIZE, COMPUTE), BOTH), 'audio'),
    'ASTModel, with positions': (
        autoencoder(
            SharedEncoder(SIZE, COMPUTE), {'audio': AudioTokenizer((5, 5), class_position=True, **FRONT)}
        ),
        'audio',
    ),
    'ViTModel': (
        autoencoder(SharedEncoder(SIZE, COMPUTE), {'image': IMAGE.clone(class_token=True, modality_token=True)}),
        'image',
    ),
    'VideoMAEForVideoClassification': (
        classifier(
            MBT(SIZE, COMPUTE, final_norm=False, fusion_layer=1),
            {'video': VIDEO},
            pooled_norm=True,
            pooled_norm_epsilon=1e-5,
        ),
        'video',
    ),
    'ASTForAudioClassification': (
        classifier(
            SharedEncoder(SIZE, COMPUTE),
            {'audio': AudioTokenizer((5, 5), 'learned', stride=(3, 4), **FRONT)},
            pooling='token',
            pooled_norm=True,
        ),
        'audio',
    ),
    'ViTForImageClassification': (
        classifier(
            SharedEncoder(EXACT, COMPUTE), {'image': IMAGE.clone(class_token=True, positions='sincos_2d')},
            pooling='token',
        ),
        'image',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', some(EXPECTED, ('VideoMAEModel', 'ASTForAudioClassification', 'ViTModel')))
def test_transformers_says_what_the_model_says(name, tmp_path):
    model, modality = EXPECTED[name]
    trained = make_trained(model).alone(modality)
    export.export(tmp_path / 'out', trained, 'huggingface', 'float32')
    theirs, problems = getattr(transformers, name.split(',')[0]).from_pretrained(
        tmp_path / 'out', output_loading_info=True
    )
    assert {key.split('.')[0] for key in problems['missing_keys']} <= {'pooler'} and not problems['unexpected_keys']
    assert f'transformers.{type(theirs).__name__}.from_pretrained' in (tmp_path / 'out/README.md').read_text()
    assert type(transformers.AutoModel.from_pretrained(tmp_path / 'out')).__name__.startswith(name[:3])
    rng = np.random.default_rng(1)
    shape = trained.row_shapes[modality]
    rows = rng.normal(size=(2, *shape)).astype(np.float32) / 3
    rows = {modality: rows if modality == 'audio' else rng.integers(0, 256, (2, *shape), dtype=np.uint8)}
    ours, inputs = functions, functions.make_inputs(trained, rows)[modality]
    axes = {'audio': (0, 1, 2), 'image': (0, 3, 1, 2), 'video': (0, 1, 4, 2, 3)}[modality]
    with torch.no_grad():
        found = theirs.eval()(torch.from_numpy(np.array(inputs).transpose(axes).copy()))
    if trained.heads:
        wanted = ours.classify(trained, trained.params, rows)['label']
        np.testing.assert_allclose(found.logits, wanted, atol=1e-4)
        assert theirs.config.id2label == dict(enumerate(NAMES)) and np.ptp(wanted) > 0.1
        return
    wanted = np.asarray(ours.encode(trained, trained.params, rows)[modality])
    if modality == 'audio':  # Theirs run over frequency first.
        grid = model.tokenizers['audio'].grid((1, *SHAPES['audio']))
        places = wanted[:, 2:].reshape(2, *grid, -1).swapaxes(1, 2).reshape(2, -1, wanted.shape[-1])
        wanted = np.concatenate([wanted[:, :2], places], axis=1)
    np.testing.assert_allclose(found.last_hidden_state, wanted, atol=1e-4)


WHOLE = {
    'ViTMAEForPreTraining': autoencoder(
        SharedEncoder(EXACT, COMPUTE),
        {'image': IMAGE.clone(positions='sincos_2d', class_token=True)},
        positions='sincos_2d',
    ).clone(decoder=SharedDecoder(Size(8, 2, 12, 1, EXACT.architecture), COMPUTE, positions='sincos_2d')),
    'VideoMAEForPreTraining': autoencoder(
        SharedEncoder(SIZE, COMPUTE), {'video': VIDEO}, projection_bias=False, final_norm_epsilon=1e-5
    ),
}


@pytest.mark.parametrize('name', some(WHOLE, ('ViTMAEForPreTraining',)))
def test_an_autoencoder_whose_decoder_is_theirs_goes_out_whole_and_comes_back_bit_for_bit(name, tmp_path):
    trained = make_trained(WHOLE[name])
    export.export(tmp_path / 'out', trained, 'huggingface', 'float32')
    again = tables.read(tmp_path / 'out', COMPUTE)
    found, wanted = flatten(again.params), flatten(trained.params)
    assert set(found) == set(wanted)
    for part, array in wanted.items():
        array = np.array(array)
        if name.startswith('Video') and part.endswith('qkv/bias'):
            array.reshape(SIZE.num_heads if 'encoder' in part else 2, 3, -1)[:, 1] = 0  # Theirs has none for keys.
        np.testing.assert_array_equal(found[part], array, err_msg=part)
    theirs = getattr(transformers, name).from_pretrained(tmp_path / 'out').eval()
    (modality,) = trained.shapes
    inputs = {modality: np.random.default_rng(0).normal(size=(1, *SHAPES[modality])).astype(np.float32)}
    num_tokens = int(np.prod(trained.model.tokenizers[modality].grid((1, *SHAPES[modality]))))
    order = np.random.default_rng(2).permutation(num_tokens)
    kept, hidden = np.sort(order[: num_tokens // 2]), np.sort(order[num_tokens // 2 :])
    masks = {modality: Mask(kept=kept[None].astype(np.int32), hidden=hidden[None].astype(np.int32))}
    ours = trained.model.apply({'params': trained.params}, inputs, masks)
    axes = {'image': (0, 3, 1, 2), 'video': (0, 1, 4, 2, 3)}[modality]
    x = torch.from_numpy(inputs[modality].transpose(axes).copy())
    with torch.no_grad():
        if name.startswith('Video'):
            bools = torch.zeros(1, num_tokens, dtype=torch.bool)
            bools[0, hidden] = True
            logits, wanted = theirs(x, bools).logits, ours.predicted_hidden[modality]
        else:
            noise = np.ones((1, num_tokens), np.float32)
            noise[0, kept] = np.linspace(0, 0.5, len(kept))
            logits, wanted = theirs(x, noise=torch.from_numpy(noise)).logits, ours.predicted[modality]
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize('name', published.CONFIGS)
def test_what_transformers_wrote_goes_out_as_the_same_class_bit_for_bit(name, tmp_path):
    imported = published.read(published.made(name), tmp_path / 'in')
    ((modality, shape),) = imported.shapes.items()
    part = AudioView(0.2) if modality == 'audio' else dataclasses.replace(VIEWS[modality], short_side=15, crop_size=15)
    trained = make_trained(WHOLE['VideoMAEForPreTraining'])._replace(
        model=imported.model, params=imported.params, shapes=imported.shapes, view=View(**{modality: part}),
        objective=Objective({modality: 0.5}, {'reconstruction': Reconstruction()}),
    )  # fmt: skip
    export.export(tmp_path / 'out', trained, 'huggingface', 'float32')
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['architectures'] == [name]
    assert ('id2label' in config) == name.endswith('Classification')
    again = huggingface_files.read_arrays(epath.Path(tmp_path / 'out'))
    assert set(again) == set(imported.arrays)
    for key, array in imported.arrays.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key, strict=True)


REFUSED = {
    'mid': (autoencoder(MidEncoder(SIZE, COMPUTE, fusion_layer=1), BOTH), 'video', 'goes through a MidEncoder'),
    'positions': (
        autoencoder(SharedEncoder(SIZE, COMPUTE), {'video': VIDEO.clone(positions='sincos_3d')}),
        'video',
        "VideoMAEModel: model.tokenizers.video.positions is 'sincos_3d', and there it is 'sincos_1d'",
    ),
    'no tokens': (
        autoencoder(SharedEncoder(SIZE, COMPUTE), {'audio': AUDIO}), 'audio', 'tokenizers.audio|class_token',
    ),
    'pooled norm': (
        classifier(SharedEncoder(SIZE, COMPUTE), {'video': VIDEO}), 'video', 'VideoMAEForVideoClassification',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_transformers_has_no_class_for_is_refused_by_the_field(name, tmp_path):
    model, modality, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path / 'out', make_trained(model).alone(modality), 'huggingface', 'float32')
    assert not list(tmp_path.iterdir())


def test_of_several_modalities_one_must_be_chosen(tmp_path):
    trained = make_trained(EXPECTED['VideoMAEModel'][0])
    with pytest.raises(ValueError, match='choose --modality=video'):
        export.export(tmp_path / 'out', trained, 'huggingface', 'float32')
    with pytest.raises(ValueError, match='--modality=image is none of video, audio'):
        trained.alone('image')


@pytest.mark.parametrize('modality, kind', [('image', 'CLIPImageProcessor'), ('video', 'VideoMAEImageProcessor')])
def test_pictures_are_resized_and_their_middle_is_cut(modality, kind):
    trained = make_trained(autoencoder(SharedEncoder(SIZE, COMPUTE), {'video': VIDEO, 'image': IMAGE}))
    parts = {'video': VideoView(4, 0.1, 14, 10), 'image': ImageView(14, 10)}
    found = huggingface.describe_preprocessor(trained._replace(view=View(**{modality: parts[modality]})))
    assert hasattr(transformers, kind)
    cut = {'do_resize': True, 'size': {'shortest_edge': 14}, 'do_center_crop': True}
    cut |= {'crop_size': {'height': 10, 'width': 10}, 'resample': 2, 'image_processor_type': kind}
    assert found | cut == found
    assert found['image_mean'] == [0.4, 0.5, 0.6]


def test_sound_has_a_preprocessor_where_theirs_is_alike():
    trained = make_trained(EXPECTED['ASTModel'][0]).alone('audio')
    assert huggingface.describe_preprocessor(trained)['feature_extractor_type'] == 'ASTFeatureExtractor'
    other = dataclasses.replace(trained.preprocess, convention='avmae')
    assert huggingface.describe_preprocessor(trained._replace(preprocess=other)) == {}
