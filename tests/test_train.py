"""What is told of another split while training: every row that counts counts once, however batches fall."""

import contextlib
import functools
import types

import jax
import numpy as np
import pytest
from etils import epath

from avmae_jax import experiment, settings, train
from avmae_jax.objectives import TERMS, Classification, Objective
from avmae_jax.parallel import hosts, rules
from avmae_jax.parallel import mesh as mesh_lib
from avmae_jax.structs import Batch, Outputs
from avmae_jax.training.state import TrainState

ROWS, CLASSES, BATCH = 29, 3, 8  # Three whole batches and one of 5 rows.
MEDIA = {'video': (2, 4), 'audio': (3, 4)}  # Tokens and values of each.


def make_rows():
    """Clips of which some have no label, some no sound and some no picture; the last batch is nearly all without."""
    rng = np.random.default_rng(0)
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, ROWS)]
    labels[[1, 9, 10, 11, 12, 13, 24, 25, 26]] = 0
    present = {'video': rng.random(ROWS) < 0.8, 'audio': rng.random(ROWS) < 0.6}
    present['audio'][16:24] = False  # A batch without any sound.
    media = {m: rng.standard_normal((ROWS, *shape)).astype(np.float32) for m, shape in MEDIA.items()}
    return Batch(
        media, present, {'label': labels}, np.arange(ROWS), np.zeros((ROWS, 2), np.uint32),
        np.ones(ROWS, np.float32), np.zeros(ROWS),
    )  # fmt: skip


@contextlib.contextmanager
def cut(rows):
    """Whole batches; the last one is filled up with copies of the first rows that do not count."""

    def batches():
        for start in range(0, ROWS, BATCH):
            places = np.arange(start, start + BATCH)
            batch = jax.tree.map(functools.partial(np.take, indices=places % ROWS, axis=0), rows)
            yield batch._replace(weight=(places < ROWS).astype(np.float32))

    yield batches()


def make_parts(model, objective):
    others = dict.fromkeys(experiment.Parts._fields)
    return experiment.Parts(
        **{**others, 'model': model, 'objective': objective, 'preprocess': lambda batch, train: batch.media}
    )


def evaluate_with(parts, rows, params, monkeypatch):
    """What the hook writes."""
    monkeypatch.setattr(experiment, 'build_eval_stream', lambda config, split: cut(rows))
    told = {}
    config = {
        'evaluation': {'every_steps': 1, 'split': 'other', 'max_batches': 100},
        'report': {'num_pictures': 1, 'pictures_every_steps': 0},
    }
    writer = types.SimpleNamespace(write_scalars=lambda step, scalars: told.update(scalars))
    with hosts.Watchdog(0.0, 1) as watchdog:
        hooks = train.make_hooks(
            config,
            parts,
            rows=rules.batch_sharding(mesh_lib.make_mesh()),
            metric_writer=writer,
            folder=epath.Path('nowhere'),
            watchdog=watchdog,
        )
        metric = hooks['evaluate'].run(TrainState(5, params, (), None, jax.random.key(0)))['metric']
    assert metric == told['other/loss']
    return {name.removeprefix('other/'): value for name, value in told.items()}


class Scorer:
    """Stands for a classifier: logits are the first values of a modality."""

    def apply(self, variables, inputs, *, train, present, rngs):
        logits = {m: variables['params'] * x[:, 0, :CLASSES] for m, x in inputs.items()}
        return types.SimpleNamespace(logits={'label': logits}, averaged={'label': sum(logits.values()) / 2})


def test_every_labelled_clip_is_counted_once_and_what_fills_a_batch_never(monkeypatch):
    rows = make_rows()
    parts = make_parts(Scorer(), Classification({'label': 'softmax'}))
    told = evaluate_with(parts, rows, np.float32(2), monkeypatch)
    labels, logits = rows.labels['label'], {m: 2 * x[:, 0, :CLASSES].astype(float) for m, x in rows.media.items()}
    labelled = labels.any(axis=1)
    right = (sum(logits.values()).argmax(axis=1) == labels.argmax(axis=1))[labelled]
    assert told['label/accuracy'] == pytest.approx(right.sum() / labelled.sum(), abs=1e-7)
    means = []
    for m, scores in logits.items():
        loss = np.log(np.exp(scores).sum(axis=1)) - (scores * labels).sum(axis=1)
        means.append(loss[labelled & rows.present[m]].mean())
        assert told[f'label/{m}'] == pytest.approx(means[-1], rel=1e-5)
    assert told['loss'] == pytest.approx(np.mean(means), rel=1e-5)


def test_what_no_clip_has_is_not_told_as_if_it_were_zero(monkeypatch):
    rows = make_rows()._replace(labels={'label': np.zeros((ROWS, CLASSES), np.float32)})
    parts = make_parts(Scorer(), Classification({'label': 'softmax'}))
    assert set(evaluate_with(parts, rows, np.float32(1), monkeypatch)) == {'loss'}


class Guesser:
    """Stands for a masked autoencoder that answers zero everywhere."""

    def grids(self, inputs):
        return {m: {2: (1, 1, 2), 3: (3, 1)}[x.shape[1]] for m, x in inputs.items()}

    def apply(self, variables, inputs, masks, places=None):
        zeros = {m: 0 * x for m, x in inputs.items()}
        hidden = {m: zeros[m][:, : masks[m].hidden.shape[1]] for m in inputs}
        asked = {m: x[..., 0] * 0 + 1 for m, x in inputs.items()}
        return Outputs({}, zeros, hidden, zeros, asked, inputs)


@pytest.mark.parametrize('name', TERMS)
def test_errors_of_an_autoencoder_are_means_over_the_clips_that_have_the_modality(name, monkeypatch):
    rows = make_rows()
    objective = Objective(dict.fromkeys(MEDIA, 0.5), {name: TERMS[name](on_all_tokens=True)})
    monkeypatch.setattr(train.painting, 'make_painter', lambda *args: lambda params, batch: None)
    told = evaluate_with(make_parts(Guesser(), objective), rows, np.float32(0), monkeypatch)
    both = rows.present['video'] & rows.present['audio']
    wanted = {m: np.square(x[both if name == 'inpainting' else rows.present[m]]).mean() for m, x in rows.media.items()}
    for m, value in wanted.items():
        assert told[f'{name}/{m}'] == pytest.approx(value, rel=1e-5)
    assert told['loss'] == pytest.approx(np.mean(list(wanted.values())), rel=1e-5)


@pytest.mark.parametrize(
    'argument, wanted',
    [
        ('--config.model.fusion_layer=1', 'config.model.fusion_layer is no setting; there are '),
        ('--config.batch_siz=1', 'config.batch_siz is no setting; did you mean batch_size?'),
        (
            '--config.model.encoder.name.x=1',
            "config.model.encoder.name.x is no setting; 'mid' is a value, which has no",
        ),
        ('--config.batch_size=1', 'None'),
    ],
)
def test_a_wrong_setting_is_told_with_its_whole_name(repository, argument, wanted):
    config = settings.read_config(str(repository / 'configs/tiny.py'))
    told = settings.find_unknown(config, ['train', '--config.seed=1', argument])
    assert str(told).startswith(wanted)


def test_a_config_that_is_not_there_is_told_by_its_name(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_flags(['train', '--workdir=nowhere', '--config=configs/nowhere.py:a=b'])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith('train: --config=configs/nowhere.py:a=b: there is no file')
