"""What a masked autoencoder was given, what it was shown of it, and what it made of that, as pictures.

A sheet has three rows for each clip: the input, what was left visible (hidden patches are grey), and the
reconstruction: predictions where patches were hidden, the input where they were visible. Where one modality
was painted from the other alone, a fourth row shows that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from avmae_jax.evaluation.drawing import (
    Picture,
    below,
    beside,
    blank,
    brightness_limits,
    caption,
    colour_spectrogram,
    put_text,
    resize,
    text_width,
    write_png,
)
from avmae_jax.ops.patches import unpatchify
from avmae_jax.structs import JOINT_ORDER, Array, Mask, Modality, Outputs

__all__ = ['PatchedMedia', 'patched_media', 'reconstruction_sheet', 'restore_scale', 'write_png']

GREY = 128
NAME_WIDTH = 92  # Of the column that names the rows.
STANDARDISED = ('none', 'patch', 'channel')


class PatchedMedia(NamedTuple):
    """One modality of some clips, in patches, before and after the model; numpy arrays.

    Attributes:
      patches: the input: video and image in [-1, 1], sound as normalised log-mel.
      predicted: the model's answer for every token.
      hidden: the tokens that the encoder did not see.
      grid: patches along each axis: (t, h, w), (s, f) or (h, w).
      patch: size of one along each axis.
      standardised: how targets were made: 'none', 'patch' (each patch to mean 0 and variance 1), or
        'channel' (each colour of it by itself).
      inpainted: predicted from the other modality alone, or None.
      inpainted_mask: 1 where `inpainted` is an answer.
    """

    patches: Float[np.ndarray, 'b n v']
    predicted: Float[np.ndarray, 'b n v']
    hidden: Int[np.ndarray, 'b m']
    grid: tuple[int, ...]
    patch: tuple[int, ...]
    standardised: str = 'none'
    inpainted: Float[np.ndarray, 'b n v'] | None = None
    inpainted_mask: np.ndarray | None = None


def patched_media(
    outputs: Outputs,
    masks: Mapping[Modality, Mask],
    grids: Mapping[Modality, Sequence[int]],
    patches: Mapping[Modality, Sequence[int]],
    *,
    standardised: Mapping[Modality, str] | None = None,
    num_clips: int = 4,
) -> dict[Modality, PatchedMedia]:
    """The first clips of a forward pass, fetched from the device, for `reconstruction_sheet`.

    Args:
      grids, patches: by modality; see PatchedMedia.
      standardised: by modality, how targets were made; 'none' where nothing is given.
    """

    def fetch(array: Any) -> np.ndarray:
        return np.asarray(array[:num_clips]).astype(np.float32)

    return {
        modality: PatchedMedia(
            patches=fetch(outputs.patches[modality]),
            predicted=fetch(outputs.predicted[modality]),
            hidden=np.asarray(masks[modality].hidden[:num_clips]),
            grid=tuple(grids[modality]),
            patch=tuple(patches[modality]),
            standardised=(standardised or {}).get(modality, 'none'),
            inpainted=fetch(outputs.inpainted[modality]) if modality in outputs.inpainted else None,
            inpainted_mask=fetch(outputs.inpainted_mask[modality]) if modality in outputs.inpainted_mask else None,
        )
        for modality in outputs.predicted
    }


def restore_scale(
    predicted: Float[Array, '*b n v'], patches: Float[Array, '*b n v'], standardised: str, num_channels: int
) -> Float[Array, '*b n v']:
    """Predictions of standardised values in the scale of the input, by each true patch's own mean and deviation.

    The model was never asked for these two numbers: what is shown is the structure it predicts within a patch.
    """
    if standardised not in STANDARDISED:
        raise ValueError(f'standardised is {standardised!r}; there are {", ".join(STANDARDISED)}.')
    if standardised == 'none':
        return predicted
    groups = num_channels if standardised == 'channel' else 1
    shape = (*patches.shape[:-1], patches.shape[-1] // groups, groups)
    true = patches.reshape(shape)
    deviation = (true.var(axis=-2, keepdims=True) + 1e-6) ** 0.5
    restored = predicted.reshape(shape) * deviation + true.mean(axis=-2, keepdims=True)
    return restored.reshape(predicted.shape)


def layers(media: PatchedMedia, clip: int, num_channels: int) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Row -> (medium [*dims c], places to grey out or None) of one clip."""
    num_tokens = media.patches.shape[1]
    hidden = np.zeros(num_tokens, bool)
    hidden[media.hidden[clip]] = True

    def put_back(patches: np.ndarray) -> np.ndarray:
        return np.asarray(unpatchify(patches[None].astype(np.float32), media.grid, media.patch))[0]

    def places(tokens: np.ndarray) -> np.ndarray:
        spread = np.repeat(tokens[:, None].astype(np.float32), media.patches.shape[-1], axis=1)
        return put_back(spread)[..., 0] > 0.5

    true = media.patches[clip]
    predicted = restore_scale(media.predicted[clip], true, media.standardised, num_channels)
    pasted = np.where(hidden[:, None], predicted, true)
    left = 100 * (1 - hidden.mean())
    rows: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        'input': (put_back(true), None),
        f'left: {left:.0f} %': (put_back(true), places(hidden)),
        'reconstructed': (put_back(pasted), None),
    }
    if media.inpainted is not None:
        answered = np.ones(num_tokens, bool) if media.inpainted_mask is None else media.inpainted_mask[clip] > 0.5
        painted = restore_scale(media.inpainted[clip], true, media.standardised, num_channels)
        rows['inpainted'] = (put_back(painted), places(~answered))
    return rows


def _frame(image: np.ndarray, hidden: np.ndarray | None) -> Picture:
    """[h w 3] in [-1, 1] as a picture."""
    picture = np.rint(np.clip((image + 1) * 127.5, 0, 255)).astype(np.uint8)
    if picture.shape[-1] == 1:
        picture = np.repeat(picture, 3, axis=-1)
    if hidden is not None:
        picture[hidden] = GREY
    return picture


def _video_rows(media: PatchedMedia, clip: int, num_frames: int, side: int) -> dict[str, Picture]:
    rows = {}
    for name, (video, hidden) in layers(media, clip, num_channels=3).items():
        if video.ndim == 3:  # An image is a video of one frame.
            video, hidden = video[None], None if hidden is None else hidden[None]
        chosen = np.linspace(0, len(video) - 1, min(num_frames, len(video))).round().astype(int)
        width = max(1, round(side * video.shape[2] / video.shape[1]))
        tiles = [
            resize(_frame(video[i], None if hidden is None else hidden[i]), height=side, width=width) for i in chosen
        ]
        rows[name] = beside(tiles)
    return rows


def _audio_rows(media: PatchedMedia, clip: int, side: int) -> dict[str, Picture]:
    found = layers(media, clip, num_channels=1)
    limits = brightness_limits(next(iter(found.values()))[0])  # Of the input, so that colours compare.
    rows = {}
    for name, (spectrogram, hidden) in found.items():
        picture = colour_spectrogram(spectrogram[..., 0], limits, hidden, grey=GREY)
        width = int(np.clip(side * picture.shape[1] / picture.shape[0], side, 4 * side))
        rows[name] = resize(picture, height=side, width=width)
    return rows


def _row_name(name: str, height: int) -> Picture:
    paper = blank(height, NAME_WIDTH)
    put_text(paper, name, NAME_WIDTH - 6 - text_width(name), height // 2 + 4)
    return paper


def reconstruction_sheet(
    media: Mapping[Modality, PatchedMedia],
    titles: Sequence[str] = (),
    *,
    num_clips: int = 4,
    num_frames: int = 6,
    side: int = 96,
    note: str = '',
) -> Picture:
    """Input, what was left, and reconstruction of the first clips, all modalities side by side.

    Args:
      titles: a line above each clip, such as its id.
      side: height of a row in pixels.
      note: written below, such as step and checkpoint.
    """
    blocks = []
    count = min(num_clips, *(len(entry.patches) for entry in media.values()))
    for clip in range(count):
        columns: list[dict[str, Picture]] = []
        for modality in JOINT_ORDER:
            if modality not in media:
                continue
            if modality == 'audio':
                columns.append(_audio_rows(media[modality], clip, side))
            else:
                columns.append(_video_rows(media[modality], clip, num_frames, side))
        lines = []
        for i in range(max(len(rows) for rows in columns)):
            # What was left differs between modalities: each column's share of it is named once, in its order.
            names = list(dict.fromkeys(list(rows)[i] for rows in columns if i < len(rows)))
            name = names[0] if len(names) == 1 else 'left: ' + ', '.join(n.removeprefix('left: ') for n in names)
            cells = [
                list(rows.values())[i] if i < len(rows) else blank(side, next(iter(rows.values())).shape[1])
                for rows in columns
            ]
            lines.append(beside([_row_name(name, side), beside(cells, gap=8)]))
        block = below(lines)
        if clip < len(titles):
            block = below([caption(titles[clip], block.shape[1]), block], gap=0)
        blocks.append(block)
    # More than a screen's height goes into two columns.
    half = -(-count // 2) if count > 4 else count
    sheet = beside([below(part, gap=10) for part in (blocks[:half], blocks[half:]) if part], gap=24)
    text = 'Reconstructed: hidden patches as predicted, visible ones from the input.'
    if any(entry.standardised != 'none' for entry in media.values()):
        text += ' Patches were predicted standardised and are shown with the mean and deviation of the true ones.'
    if any(entry.inpainted is not None for entry in media.values()):
        text += ' Inpainted: predicted from the other modality alone.'
    sheet = below([sheet, caption(f'{text} {note}'.strip(), sheet.shape[1])], gap=4)
    return np.pad(sheet, ((6, 6), (6, 6), (0, 0)), constant_values=255)
