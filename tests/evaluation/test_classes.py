import types

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from avmae_jax.evaluation import benchmarks, classes, tables
from avmae_jax.structs import Batch

NAMES = {'label': ('cat', 'dog', 'owl')}
WAYS = classes.ways_of(['audio', 'video'])
# Row 1 has no sound, row 2 no picture, row 3 neither.
PRESENT = {'video': np.array([True, True, False, False]), 'audio': np.array([True, False, True, False])}


class Sums:
    """Stands for a classifier: the logits are the sum over modalities of the first values of a row."""

    def apply(self, variables, inputs, *, present):
        logits = sum(x[:, :3] for x in inputs.values())
        return types.SimpleNamespace(averaged={'label': logits * variables['params']})


def preprocess(batch, *, train):
    assert not train
    return {m: jnp.asarray(x, jnp.float32) for m, x in batch.media.items()}


def make_table():
    media = {'video': np.eye(4, 5, dtype=np.float32), 'audio': 10 * np.eye(4, 5, 1, dtype=np.float32)}
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    rows = np.arange(4)
    batch = Batch(media, PRESENT, {'label': targets}, rows, np.zeros((4, 2), np.uint32), np.ones(4), np.zeros(4))
    table = classes.make_logit_step(Sums(), preprocess, WAYS)(1.0, batch)
    return media, {**{way: {'label': np.asarray(table[way]['label'])} for way in WAYS}, 'labels': batch.labels,
                   'scored': {way: np.asarray(x) for way, x in table['scored'].items()}}  # fmt: skip


def test_a_model_of_one_modality_is_asked_in_one_way():
    assert classes.ways_of(['audio']) == ['everything']
    assert WAYS == ['everything', 'video alone', 'audio alone', 'video missing', 'audio missing']


def test_alone_is_the_stream_by_itself_and_missing_is_the_clip_without_it():
    media, table = make_table()
    both = media['video'] + media['audio']
    # Here a picture that is missing is zeros, and a stream that is not there adds none.
    wanted = {'everything': both, 'video alone': media['video'], 'audio missing': media['video'],
              'audio alone': media['audio'], 'video missing': media['audio']}  # fmt: skip
    for way, logits in wanted.items():
        np.testing.assert_array_equal(table[way]['label'], logits[:, :3], err_msg=way)


def test_a_clip_without_what_is_looked_at_counts_for_everything_alone():
    _, table = make_table()
    counted = {way: classes.heads_of(table, way, NAMES)['label'].targets.any(axis=1) for way in WAYS}
    assert counted['everything'].all()
    for modality, other in (('video', 'audio'), ('audio', 'video')):
        np.testing.assert_array_equal(counted[f'{modality} alone'], PRESENT[modality])
        np.testing.assert_array_equal(counted[f'{modality} missing'], PRESENT[other])


def test_every_way_is_a_row_a_score_beside_what_is_lost():
    _, table = make_table()
    rows = classes.modality_rows(table, 'single-label', WAYS, NAMES)
    top = {row['given']: row for row in rows if row['metric'] == 'top-1'}
    assert list(top) == WAYS and top['everything']['difference'] == 0
    assert [top[way]['num_records'] for way in WAYS] == [4, 2, 2, 2, 2]
    for row in top.values():
        assert row['difference'] == row['value'] - top['everything']['value']
    text = tables.modality_table(rows)
    assert all(way in text for way in WAYS) and len(text.splitlines()) == 3 + 3
    # Where no clip has sound there is nothing to be said of sound alone.
    silent = {**table, 'scored': {**table['scored'], 'audio alone': np.zeros(4, bool)}}
    ways = {row['given'] for row in classes.modality_rows(silent, 'single-label', WAYS, NAMES)}
    assert ways == set(WAYS) - {'audio alone'}


def test_the_benchmark_goes_with_the_heads():
    assert classes.benchmark_kind({'label': 'softmax'}) == 'single-label'
    assert classes.benchmark_kind({'label': 'sigmoid'}) == 'multi-label'
    assert classes.benchmark_kind({'noun': 'softmax', 'verb': 'softmax'}) == 'verb-noun'
    with pytest.raises(ValueError, match='heads mixes sigmoid and softmax'):
        classes.benchmark_kind({'label': 'softmax', 'tags': 'sigmoid'})


def test_logits_are_kept_with_what_they_are_of(tmp_path):
    _, table = make_table()
    heads = classes.heads_of(table, 'everything', NAMES)
    classes.write_logits(tmp_path / 'logits.npz', ['a', 'b', 'c', 'd'], heads)
    with np.load(tmp_path / 'logits.npz') as stored:
        assert stored['ids'].tolist() == ['a', 'b', 'c', 'd'] and stored['label/names'].tolist() == [*NAMES['label']]
        np.testing.assert_array_equal(stored['label/logits'], heads['label'].logits)
        np.testing.assert_array_equal(stored['label/targets'], heads['label'].targets)


def test_the_subsets_of_the_challenge_are_read_from_the_files_beside_its_annotations(tmp_path):
    (tmp_path / 'EPIC_100_unseen_participant_ids_validation.csv').write_text('participant_id\nP18\n')
    (tmp_path / 'EPIC_100_tail_verbs.csv').write_text('verb\n1\n')
    (tmp_path / 'EPIC_100_tail_nouns.csv').write_text('noun\n0\n3\n')
    found = benchmarks.read_subsets(epath.Path(tmp_path), ['P01_11_0', 'P18_02_7'], {'verb': 2, 'noun': 4})
    assert found['unseen'].tolist() == [False, True]
    assert {head: x.tolist() for head, x in found['tail'].items()} == {
        'verb': [False, True], 'noun': [True, False, False, True],
    }  # fmt: skip
