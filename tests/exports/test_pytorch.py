"""The PyTorch module of an export says what the model says, for every encoder at odd sizes, and can be finetuned."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="needs pip install 'avmae_jax[interop]'")
pytest.importorskip('safetensors.torch')

from avmae_jax import export  # noqa: E402
from avmae_jax.data.schema import DatasetInfo, LabelSet, MediaSettings  # noqa: E402
from avmae_jax.data.views import AudioView, VideoView, View  # noqa: E402
from avmae_jax.exports import functions, pytorch  # noqa: E402
from avmae_jax.exports.trained import Trained  # noqa: E402
from avmae_jax.models.blocks import Compute  # noqa: E402
from avmae_jax.models.bottleneck import MBT  # noqa: E402
from avmae_jax.models.classifier import Classifier  # noqa: E402
from avmae_jax.models.encoders import ENCODERS, MidEncoder, SharedEncoder  # noqa: E402
from avmae_jax.models.sizes import Architecture, Size  # noqa: E402
from avmae_jax.models.tokenizers import AudioTokenizer, VideoTokenizer  # noqa: E402
from avmae_jax.ops.preprocess import Preprocess  # noqa: E402
from avmae_jax.ops.spectrogram import CONVENTIONS, get_convention, log_mel  # noqa: E402
from avmae_jax.weights import torch_module  # noqa: E402
from avmae_jax.weights.table import flatten  # noqa: E402

torch.set_num_threads(1)
COMPUTE = Compute('float32', scan=True)
SIZE = Size(width=24, num_heads=3, mlp_width=40, num_layers=3)
# Rows that patches do not divide, 6 s 10 f of sound and 3 frames of 10 x 14.
VIEW = View(video=VideoView(3, 0.1, 10, 10), audio=AudioView(0.2))
SHAPES = {'video': (3, 10, 10, 3), 'audio': (21, 17), 'image': (10, 10, 3)}
VIDEO, AUDIO = VideoTokenizer((2, 4, 5)), AudioTokenizer((4, 5))
LABELS = {'label': LabelSet(('a', 'b', 'c', 'd'), False), 'other': LabelSet(('x', 'y'), False)}
INFO = DatasetInfo('made up', ('audio', 'video'), MediaSettings(None, 0.0, 0, 0, 16_000, None, 0), {}, LABELS, {})


def make_trained(model, seed=0, view=VIEW, **preprocess):
    """A model with random numbers everywhere."""
    shapes = {m: SHAPES[m] for m in model.tokenizers}
    inputs = {m: np.zeros((1, *shape), np.float32) for m, shape in shapes.items()}
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), params)
    settings = dict(num_mel_bins=17, num_spec_frames=21, audio_mean=-3.1, audio_std=2.3, rgb_mean=(0.4, 0.5, 0.6))
    about = {'step': 7, 'trained_on': '', 'averaged': False, 'averaged_steps': [7]}
    return Trained(model, params, None, view, Preprocess(**settings, **preprocess), INFO, shapes, {}, about)


def make_rows(trained, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = trained.row_shapes
    rows = {m: rng.integers(0, 256, (batch, *shapes[m]), dtype=np.uint8) for m in shapes if m != 'audio'}
    if 'audio' in shapes:
        rows['audio'] = rng.uniform(-1, 1, (batch, *shapes['audio'])).astype(np.float32)
    return rows


def import_module(folder):
    """avmae_torch.py of an export, from where it lies."""
    spec = importlib.util.spec_from_file_location('avmae_torch', folder / 'avmae_torch.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(trained, folder, dtype='float32', **more):
    export.export(folder, trained, 'torch', dtype)
    return import_module(folder).AVMAE.from_pretrained(folder, **more)


def some(names, quick):
    """All of the names; those that are not quick for `-m slow`."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def as_torch(rows):
    return {m: torch.from_numpy(x) for m, x in rows.items()}


def classifier(encoder, tokenizers=None, **fields):
    return Classifier(
        tokenizers or {'video': VIDEO, 'audio': AUDIO}, encoder, num_classes={'label': 4, 'other': 2}, **fields
    )


def tokens(**fields):
    return {'video': VIDEO.clone(**fields), 'audio': AUDIO.clone(**fields)}


TOKEN = tokens(class_token=True, class_position=True, modality_token=True)
ODD = Size(24, 2, 40, 3, Architecture('exact', 1e-4, qkv_bias=False))
MODELS = {
    'separate': classifier(ENCODERS['separate'](SIZE, COMPUTE)),
    'shared': classifier(SharedEncoder(SIZE, COMPUTE, final_norm=False), pooled_norm=True, pooled_norm_epsilon=1e-3),
    'early': classifier(
        ENCODERS['early'](ODD, COMPUTE, final_norm_epsilon=1e-3), tokens(positions='learned', modality_token=True)
    ),
    'mid': classifier(
        MidEncoder(SIZE, COMPUTE, fusion_layer=2),
        tokens(positions='learned', class_token=True),
        pooling='max',
        representation=7,
    ),
    'norms by modality': classifier(
        MidEncoder(ODD, COMPUTE, fusion_layer=1, stream_norm=False, modality_norms=True, final_norm_epsilon=1e-3)
    ),
    'bottlenecks': classifier(MBT(SIZE, COMPUTE, fusion_layer=1), TOKEN, pooling='token'),
    'shared bottlenecks': classifier(
        MBT(SIZE, COMPUTE, fusion_layer=2, num_bottlenecks=2, shared_weights=True), pooling='joint_mean'
    ),
    'no bottlenecks in tests': classifier(MBT(SIZE, COMPUTE, fusion_layer=1, test_with_bottlenecks=False)),
    'concatenation': classifier(MBT(SIZE, COMPUTE, fusion_layer=1, fusion='concatenation'), TOKEN, pooling='one_token'),
    'one stream': classifier(MBT(SIZE, COMPUTE, fusion_layer=1, fusion='concatenation', shared_weights=True)),
    'late': classifier(MBT(SIZE, COMPUTE, fusion_layer=3), pooling='first'),
    'axes': classifier(
        ENCODERS['separate'](SIZE, COMPUTE),
        {'video': VideoTokenizer((1, 3, 4), 'sincos_3d'), 'audio': AudioTokenizer((4, 5), 'sincos_2d', channels=3)},
    ),
    'space and time': classifier(
        SharedEncoder(SIZE, COMPUTE), {'video': VideoTokenizer((1, 4, 4), 'learned_space_time')}
    ),
    'overlapping': classifier(
        SharedEncoder(SIZE, COMPUTE),
        {'audio': AudioTokenizer((4, 6), 'learned', False, True, True, True, stride=(3, 4))},
        pooling='token',
    ),
}


def answers(trained, media):
    """What our model says of several sets of media; compiled as one."""

    def ask(params, media):
        return [
            {name: function(trained, params, rows) for name, function in functions.FUNCTIONS.items()}
            for rows in media
            if not (trained.model.pooling == 'one_token' and 'video' not in rows)
        ]

    return jax.jit(ask)(trained.params, media)


@pytest.mark.parametrize('name', some(MODELS, ('early', 'mid', 'norms by modality', 'bottlenecks', 'overlapping')))
def test_the_module_says_what_the_model_says(name, tmp_path):
    model = MODELS[name]
    view = View(**{m: part for m, part in VIEW.parts.items() if m in model.tokenizers})
    trained = make_trained(model, view=view)
    theirs, rows = load(trained, tmp_path / 'out'), make_rows(trained)
    media = [rows, *({m: x} for m, x in rows.items() if len(rows) > 1)]
    for wanted, given in zip(answers(trained, media), media, strict=False):
        with torch.no_grad():
            found = {kind: getattr(theirs, kind)(**as_torch(given)) for kind in wanted}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
        assert all(np.ptp(logits) > 0.1 for logits in wanted['classify'].values())  # They say something.


def test_going_to_pytorch_and_back_is_the_identity(tmp_path):
    for name in ('mid', 'norms by modality', 'bottlenecks', 'early', 'overlapping'):
        model = MODELS[name]
        trained = make_trained(model)
        arrays = torch_module.dump(model, trained.params)
        inputs = {m: np.zeros((1, *SHAPES[m]), np.float32) for m in model.tokenizers}
        again = flatten(torch_module.load(model, arrays, inputs))
        for part, array in flatten(trained.params).items():
            assert np.asarray(again[part]).tobytes() == array.tobytes(), part


def test_parameters_in_bfloat16_are_read_too(tmp_path):
    trained = make_trained(MODELS['mid'])
    whole, half = load(trained, tmp_path / 'whole'), load(trained, tmp_path / 'half', 'bfloat16')
    rows = as_torch(make_rows(trained))
    with torch.no_grad():
        a, b = whole(**rows)['label'], half(**rows)['label']
    assert b.dtype == torch.float32 and 1e-4 < float((a - b).abs().max()) < 0.5


@pytest.mark.parametrize('convention', CONVENTIONS)
@pytest.mark.parametrize('num_frames', [None, 15, 40])
def test_the_log_mel_is_ours(convention, num_frames, tmp_path):
    settings = get_convention(convention, num_mel_bins=23, sample_rate=12_000, max_hz=5_500.0)
    waveform = np.random.default_rng(0).normal(size=(2, 4321)).astype(np.float32) * 0.2
    waveform[1, 1000:3000] = 0  # Silence meets the floor.
    (tmp_path / 'avmae_torch.py').write_text(
        (pytorch.importlib.resources.files('avmae_jax.exports') / 'avmae_torch.py').read_text()
    )
    module = import_module(tmp_path).LogMel(dataclasses.asdict(settings), num_frames)
    wanted = log_mel(waveform, settings, num_frames)
    np.testing.assert_allclose(module(torch.from_numpy(waveform)), wanted, atol=1e-4)


def test_a_pytorch_user_finetunes_it(tmp_path):
    trained = make_trained(MODELS['bottlenecks'])
    model = load(trained, tmp_path / 'out', num_classes={'animal': 3})
    assert not model.training and set(model.heads) == {'animal'}
    rows, labels = as_torch(make_rows(trained, batch=6)), torch.tensor([0, 1, 2, 0, 1, 2])
    assert not model(**rows)['animal'].any()  # A fresh head says nothing.
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(**rows)['animal'], labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_drop_path_leaves_the_mean_of_a_residual(tmp_path):
    trained = make_trained(MODELS['separate'])
    model = load(trained, tmp_path / 'out')
    block = model.encoder.stacks['audio'].layers[2]
    block.drop_path, block.training = 0.25, True
    torch.manual_seed(0)
    kept = block._dropped(torch.ones(4000, 1, 1))
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.03)
    block.eval()
    assert (block._dropped(torch.ones(5, 1, 1)) == 1).all()


def test_what_the_module_does_not_have_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Other:
        patch: tuple = (2, 2)
        twist: float = 0.5

    assert pytorch._fields(Other(), 'x', ('patch',)) == {'patch': (2, 2)}
    with pytest.raises(ValueError, match='no counterpart of x.twist=0.75'):
        pytorch._fields(Other(twist=0.75), 'x', ('patch',))


def test_wrong_media_are_told(tmp_path):
    trained = make_trained(MODELS['separate'])
    model, rows = load(trained, tmp_path / 'out'), as_torch(make_rows(trained))
    with pytest.raises(ValueError, match='takes video and audio; got'):
        model.embed(image=rows['video'][:, 0])
    with pytest.raises(ValueError, match='video is uint8'):
        model.embed(video=rows['video'].float())
    with pytest.raises(ValueError, match=r'audio is float \[b l\]'):
        model.embed(audio=rows['audio'][:, :, None])
    for media, complaint in (
        ({'video': rows['video'].numpy()}, 'media are tensors of torch; got ndarray'),
        ({'video': rows['video'][:0]}, r'at least one; got video \[0, '),
        ({**rows, 'audio': rows['audio'][:1]}, 'as many clips of each modality are wanted'),
        ({'audio': rows['audio'][:, :9]}, 'audio of 9 samples is shorter than one window of 400'),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.embed(**media)
