"""Several datasets as one stream, by weight: place p of the mixture is place q of one of them.

The weights are met exactly in the long run and within one clip per dataset at any moment, and every place is
computed from p alone, with whole numbers only, so that it is the same on every host and after every resume.
"""

from __future__ import annotations

import bisect
import fractions
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avmae_jax.data import order
from avmae_jax.data.balance import WeightedOrder
from avmae_jax.data.schema import LabelSet
from avmae_jax.data.sources import Source
from avmae_jax.structs import Clip


class Place(NamedTuple):
    """What lies at a place of the training stream.

    Attributes:
      epoch: which time this record comes, for what is drawn for it: how often its dataset has been gone through before.
        Where clips are drawn by weight and one may come several times an epoch, the number of the draw.
      record: index in the mixture: the datasets' records one after the other.
    """

    epoch: int
    record: int


class Mixture:
    """Datasets and how often each is drawn from. One dataset alone is a mixture too.

    Args:
      weights: any positive numbers; 3 and 1 are the same as 0.75 and 0.25. None means by number of records.
      clip_weights: for each dataset, the weights of its clips (see `balance.clip_weights`), or None where every clip
        comes once an epoch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[int | float] | None = None,
        clip_weights: Sequence[np.ndarray | None] | None = None,
    ):
        self.sources = tuple(sources)
        for source in sources:
            if not len(source):
                raise ValueError(f'{source.info.name} has no records in split {source.split!r}.')
        if weights is None:
            weights = [len(source) for source in sources]
        if not sources or len(weights) != len(sources) or min(weights) <= 0:
            raise ValueError(f'weights must be one positive number for each of {len(sources)} datasets; got {weights}.')
        self.weights = tuple(float(weight) for weight in weights)
        self._starts = [0, *itertools.accumulate(len(source) for source in sources)]
        exact = [fractions.Fraction(weight) for weight in self.weights]
        # Of the places that the datasets before k left over, the share that k takes.
        self._shares = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]
        if clip_weights is None:
            clip_weights = [None] * len(sources)
        lengths = [None if each is None else len(each) for each in clip_weights]
        if len(lengths) != len(sources) or any(n not in (None, len(s)) for n, s in zip(lengths, sources, strict=True)):
            raise ValueError(
                f'clip_weights must be None or one number a clip for each dataset; got {lengths} numbers for '
                f'{[len(source) for source in sources]} clips.'
            )
        self._weighted = [None if each is None else WeightedOrder(each) for each in clip_weights]
        media = {(s.info.media.sample_rate, s.spectrogram_shape) for s in sources if 'audio' in s.info.modalities}
        if len(media) > 1:
            raise ValueError(f'datasets of one mixture must store sound alike; got (sample_rate, log-mel): {media}.')

    @property
    def sample_rate(self) -> int:
        return max((s.info.media.sample_rate for s in self.sources if 'audio' in s.info.modalities), default=0)

    @property
    def spectrogram_shape(self) -> tuple[int, int] | None:
        return next((s.spectrogram_shape for s in self.sources if 'audio' in s.info.modalities), None)

    @property
    def labels(self) -> dict[str, LabelSet]:
        """Heads whose classes are the same in all datasets; of others a row of the mixture could not tell."""
        first, *rest = (source.info.labels for source in self.sources)
        return {head: labels for head, labels in first.items() if all(other.get(head) == labels for other in rest)}

    def __len__(self) -> int:
        return self._starts[-1]

    def dataset_of(self, record: int) -> tuple[int, int]:
        """(dataset, index within it) of a record of the mixture."""
        k = bisect.bisect_right(self._starts, record) - 1
        return k, record - self._starts[k]

    def next_record(self, record: int) -> int:
        """The record that stands in for a damaged one: the next of the same dataset."""
        k, i = self.dataset_of(record)
        return self._starts[k] + (i + 1) % len(self.sources[k])

    def __getitem__(self, record: int) -> Clip:
        k, i = self.dataset_of(record)
        return self.sources[k][i]

    def where(self, record: int) -> str:
        k, i = self.dataset_of(record)
        return self.sources[k].where(i)

    def draw(self, place: int) -> tuple[int, int]:
        """(dataset, how many of its clips came before) at a place of the stream."""
        for k, share in enumerate(self._shares[:-1]):
            taken = place * share.numerator // share.denominator
            if (place + 1) * share.numerator // share.denominator > taken:
                return k, taken
            place -= taken
        return len(self._shares) - 1, place

    def place(self, place: int, seed: int) -> Place:
        """What lies at a place of the shuffled stream; each dataset is shuffled anew every epoch."""
        k, count = self.draw(place)
        epoch, within = divmod(count, len(self.sources[k]))
        weighted = self._weighted[k]
        if weighted is not None:
            return Place(count, self._starts[k] + weighted.record(within, seed, k, epoch))
        return Place(epoch, self._starts[k] + order.shuffle(within, len(self.sources[k]), seed, k, epoch))
