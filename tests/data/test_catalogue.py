import os
import pathlib

import pytest

from avmae_jax.data import catalogue
from avmae_jax.data.prepare import lists, manifest


@pytest.fixture(scope='module')
def labels(repository) -> pathlib.Path:
    folder = pathlib.Path(os.environ.get('AVMAE_DATA', repository.parent / 'shared' / 'data')) / 'labels'
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there; set AVMAE_DATA to the folder with the published tables.')
    return folder


@pytest.mark.parametrize(
    'name, head, table',
    [
        ('audioset', 'label', 'audioset/class_labels_indices.csv'),
        ('vggsound', 'label', 'vggsound/class_labels_indices_vgg.csv'),
        ('epic', 'verb', 'epic100/EPIC_100_verb_classes.csv'),
        ('epic', 'noun', 'epic100/EPIC_100_noun_classes.csv'),
        ('esc50', 'label', 'esc50/esc_class_labels_indices.csv'),
    ],
)
def test_classes_are_as_many_as_published(labels, name, head, table):
    assert len(manifest.read_label_names(str(labels / table))) == catalogue.DATASETS[name].num_classes[head]


@pytest.mark.parametrize(
    'name, split, table, header',
    [
        ('audioset', 'test', 'audioset/eval_segments.csv', 1),
        ('vggsound', 'test', 'vggsound/test.csv', 0),
        ('epic', 'validation', 'epic100/EPIC_100_validation.csv', 1),
    ],
)
def test_clips_are_as_many_as_published(labels, name, split, table, header):
    lines = sum(bool(line.strip()) for line in (labels / table).open())
    assert lines - header == catalogue.DATASETS[name].num_clips[split]


def test_every_dataset_with_a_format_of_its_own_is_known():
    assert set(catalogue.DATASETS) == set(lists.FORMATS) - {'csv', 'folder'}
    assert set(catalogue.BY_FORMAT) <= set(lists.FORMATS)
