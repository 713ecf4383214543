"""The nouns that the packages hand to each other, and the letters their shapes are written in.

    b  rows of a batch        t h w c  frames, height, width, colour channels
    n  tokens of a modality   k        tokens that were kept (visible to the encoder)
    d  width of a token       v        values of a patch (what a token is asked to reconstruct)
    s f  time bins and mel bins of a spectrogram         l  samples of a waveform

This file imports neither jax nor TensorFlow: loader workers import it, and must start fast and small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Modality = str  # 'video', 'audio' or 'image'
JOINT_ORDER = ('image', 'video', 'audio')  # The order in which modalities are looped over and concatenated.

Array = Any  # A jax or a numpy array. Signatures that check shapes use jaxtyping instead.


class Clip(NamedTuple):
    """One stored clip as `data/schema.py` reads it; still encoded, because decoding needs the window.

    Attributes:
      id: unique within its dataset; names the clip in logs, predictions and failures.
      frames: one JPEG a frame, at `fps` frames a second. Empty when `h264` holds the picture.
      h264: an mp4 with the picture of the clip alone, or b''.
      num_frames: frames stored, in either codec; 0 without a picture, 1 for an image.
      fps: stored frames a second; 0 for an image.
      waveform: int16 [l] at `sample_rate`, or None when there is no sound.
      spectrogram: float32 [s f], the stored log-mel of a legacy record, or None.
      sample_rate: samples a second of `waveform`.
      duration: seconds.
      has: modality -> False where the medium was missing or unreadable and has been filled.
      labels: head -> class indices. An unlabelled clip has no heads.
    """

    id: str
    frames: Sequence[bytes]
    h264: bytes
    num_frames: int
    fps: float
    waveform: np.ndarray | None
    spectrogram: np.ndarray | None
    sample_rate: int
    duration: float
    has: dict[Modality, bool]
    labels: dict[str, list[int]]


class Batch(NamedTuple):
    """Rows for one step; numpy on the host, jax arrays on the device. A pytree.

    Attributes:
      media: 'video' uint8 [b t h w 3]; 'audio' int16 [b l] (waveform) or float32 [b s f] (stored
        log-mel); 'image' uint8 [b h w 3].
      present: modality -> bool [b]; False where the clip lacks it (its loss does not count).
      labels: head -> float32 [b classes], multi-hot; {} for data without labels.
      record: int32 [b], index of the record in its dataset (in the mixture, when there are several).
      seed: uint32 [b 2], a function of (seed, epoch, record, view) alone; the key data of everything
        drawn for this row on the device (flip, sound augmentation).
      weight: float32 [b], 1 for a row that counts and 0 for padding of the last batch.
      damaged: int32 [b], records that were damaged and passed over to get this row.
    """

    media: dict[Modality, Array]
    present: dict[Modality, Array]
    labels: dict[str, Array]
    record: Array
    seed: Array
    weight: Array
    damaged: Array


class Mask(NamedTuple):
    """Which tokens of one modality the encoder sees; together every token exactly once.

    Attributes:
      kept: int32 [b k], token indices in the order in which the encoder gets them.
      hidden: int32 [b n-k].
    """

    kept: Array
    hidden: Array


class Outputs(NamedTuple):
    """All that a masked autoencoder computes; `jit` drops what no term of the objective asks for.

    Attributes (dicts by modality):
      encoded: [b k d] tokens after the encoder.
      predicted: [b n v] values for every token, in token order.
      predicted_hidden: [b n-k v] the same for the hidden tokens only, in the order of `mask.hidden`.
      inpainted: [b n v] values predicted from the other modality's tokens alone; {} for one modality.
      inpainted_mask: [b n] 1 where `inpainted` answers for a mask token, hence where its loss counts.
      patches: [b n v] the input cut into patches, float32; targets are made from it.
    """

    encoded: dict[Modality, Array]
    predicted: dict[Modality, Array]
    predicted_hidden: dict[Modality, Array]
    inpainted: dict[Modality, Array]
    inpainted_mask: dict[Modality, Array]
    patches: dict[Modality, Array]


class Scores(NamedTuple):
    """All that a classifier computes.

    A part is what logits are made from: a modality, or 'joint' where pooling leaves one vector for the whole clip. In
    training every part has a loss of its own; at test the mean of their logits counts.

    Attributes:
      encoded: modality -> [b n d] tokens after the encoder, class tokens included.
      pooled: part -> [b d], what the heads get.
      logits: head -> part -> [b classes].
      averaged: head -> [b classes], the mean over the parts; over those a row has, where `present` is given.
    """

    encoded: dict[Modality, Array]
    pooled: dict[str, Array]
    logits: dict[str, dict[str, Array]]
    averaged: dict[str, Array]
