"""The published datasets: how many classes and clips they have, and where that is written.

Clip counts are those of the publications. Files vanish from the web, so fewer will be found; `prepare`
says how many of how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Dataset(NamedTuple):
    """Attributes:
    title: as people know it.
    num_classes: head -> classes.
    multi_label: a clip may have several classes.
    num_clips: split -> clips published.
    clip_seconds: the usual length; None where clips have any.
    source: where these numbers are from.
    """

    title: str
    num_classes: Mapping[str, int]
    multi_label: bool
    num_clips: Mapping[str, int]
    clip_seconds: float | None
    source: str


DATASETS = MappingProxyType(
    {
        'audioset': Dataset(
            title='AudioSet',
            num_classes={'label': 527},
            multi_label=True,
            # 2,041,789 unbalanced + 22,160 balanced segments.
            num_clips={'train': 2_063_949, 'test': 20_371},
            clip_seconds=10.0,
            source='Gemmeke et al., ICASSP 2017; the segment lists at research.google.com/audioset/download.html',
        ),
        'vggsound': Dataset(
            title='VGGSound',
            num_classes={'label': 309},
            multi_label=False,
            num_clips={'train': 183_730, 'test': 15_446},
            clip_seconds=10.0,
            source='Chen et al., ICASSP 2020; vggsound.csv of the authors, 199,176 lines',
        ),
        'epic': Dataset(
            title='EPIC-KITCHENS-100',
            num_classes={'verb': 97, 'noun': 300},
            multi_label=False,
            num_clips={'train': 67_217, 'validation': 9_668, 'test': 13_092},
            clip_seconds=None,
            source='Damen et al., IJCV 2022; github.com/epic-kitchens/epic-kitchens-100-annotations',
        ),
        'esc50': Dataset(
            title='ESC-50',
            num_classes={'label': 50},
            multi_label=False,
            num_clips={f'fold{i}': 400 for i in range(1, 6)},
            clip_seconds=5.0,
            source='Piczak, ACM Multimedia 2015; five folds of 400 clips, each the test of one training run',
        ),
    }
)

# The formats of `data/prepare/lists.py` that are published lists, by the name of their dataset. ESC-50's
# list is also that of ESC-10, so its classes are taken from the list.
BY_FORMAT = MappingProxyType({name: DATASETS[name] for name in ('audioset', 'vggsound', 'epic')})
