"""A dataset of which only the description is known: enough to build a model and to plan a run, nothing to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from avmae_jax.data.schema import DatasetInfo, LabelSet, MediaSettings, unnamed_classes

SPLITS = ('train', 'test', 'validation', *(f'fold{i}' for i in range(1, 6)))


class Described:
    """Clips as they would be if somebody prepared them.

    Args:
      classes: head -> how many; () without labels.
      multi_label: whether a clip may have several classes.
      image: still pictures, in place of video with sound.
      fps: stored frames a second.
      spectrogram_shape: as of `sources.Source`.
      conventions: of the log-mels for which there are statistics.
    """

    split = 'train'

    def __init__(
        self,
        name: str,
        num_clips: int,
        *,
        classes: Mapping[str, int] | None = None,
        multi_label: bool = False,
        image: bool = False,
        fps: float | int = 12.5,
        short_side: int = 256,
        sample_rate: int = 16_000,
        clip_seconds: float | int | None = 10.0,
        spectrogram_shape: tuple[int, int] | None = None,
        conventions: Sequence[str] = ('avmae', 'kaldi'),
    ):
        if num_clips < 1:
            raise ValueError(f'a dataset has at least one clip; got {num_clips}.')
        self.num_clips = num_clips
        self.spectrogram_shape = spectrogram_shape
        media = MediaSettings(
            codec='jpeg',
            fps=float(fps),
            short_side=short_side,
            jpeg_quality=85,
            sample_rate=sample_rate,
            clip_seconds=clip_seconds,
            gop=0,
        )
        self.info = DatasetInfo(
            name=name,
            modalities=('image',) if image else ('audio', 'video'),
            media=media,
            splits=dict.fromkeys(SPLITS, ()),
            labels={head: LabelSet(unnamed_classes(count), multi_label) for head, count in (classes or {}).items()},
            statistics={'audio': {convention: {'mean': 0.0, 'std': 1.0} for convention in conventions}},
        )

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> NoReturn:
        raise IndexError(f'{self.info.name} is only described: there is no clip {index} to read.')

    def where(self, index: int) -> str:
        return f'clip {index} of {self.info.name}, which is only described'
