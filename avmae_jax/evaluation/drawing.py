"""Pictures from numbers: tiles with captions, spectrograms in colour, curves with axes. Neither jax nor matplotlib.

Everything is uint8 [h w 3] in RGB. Text is drawn with OpenCV's own strokes: letters of ASCII, no font files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from etils import epath
from jaxtyping import Float, Int16, UInt8

Picture = UInt8[np.ndarray, '_h _w 3']  # Names with _ are not bound: pictures in one call differ in size.

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 34), (214, 214, 220)
# Distinct also to eyes that do not tell red from green (Okabe and Ito).
LINE_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
FONT = cv2.FONT_HERSHEY_SIMPLEX
TEXT_HEIGHT = 16  # Of a line at scale 0.4, with the space around it.


def write_png(path: epath.PathLike, picture: Picture) -> None:
    ok, data = cv2.imencode('.png', np.ascontiguousarray(picture[..., ::-1]))
    assert ok, picture.shape
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def blank(height: int, width: int, colour: tuple[int, int, int] = PAPER) -> Picture:
    return np.full((height, width, 3), colour, np.uint8)


def text_width(text: str, scale: float = 0.4) -> int:
    return cv2.getTextSize(_ascii(text), FONT, scale, 1)[0][0]


def _ascii(text: str) -> str:
    return text.encode('ascii', 'replace').decode()


def put_text(
    picture: Picture, text: str, x: int, y: int, colour: tuple[int, int, int] = INK, scale: float = 0.4
) -> None:
    """Writes onto the picture; (x, y) is the left end of the baseline."""
    cv2.putText(picture, _ascii(text), (x, y), FONT, scale, colour, 1, cv2.LINE_AA)


def caption(text: str, width: int, scale: float = 0.4) -> Picture:
    """Lines of text on paper, broken between words to fit the width."""
    lines = ['']
    for word in text.split(' '):
        longer = f'{lines[-1]} {word}'.strip()
        if text_width(longer, scale) > width - 8 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    paper = blank(TEXT_HEIGHT * len(lines) + 4, width)
    for i, line in enumerate(lines):
        put_text(paper, line, 4, TEXT_HEIGHT * (i + 1) - 3, scale=scale)
    return paper


def beside(pictures: Sequence[Picture], gap: int = 2) -> Picture:
    """In a row, at the top; lower ones are filled with paper."""
    height = max(len(picture) for picture in pictures)
    parts = []
    for picture in pictures:
        fill = blank(height - len(picture), picture.shape[1])
        parts += [np.concatenate([picture, fill]), blank(height, gap)]
    return np.concatenate(parts[:-1], axis=1)


def below(pictures: Sequence[Picture], gap: int = 2) -> Picture:
    """One under the other, to the left; narrower ones are filled with paper."""
    return np.ascontiguousarray(
        beside([np.ascontiguousarray(picture.transpose(1, 0, 2)) for picture in pictures], gap).transpose(1, 0, 2)
    )


def resize(picture: Picture, height: int, width: int) -> Picture:
    """Smaller by area, larger in whole pixels: what a patch is stays visible."""
    smaller = height < picture.shape[0] or width < picture.shape[1]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST)


def colour_spectrogram(
    spectrogram: Float[np.ndarray, 's f'],
    limits: tuple[float, float],
    hidden: np.ndarray | None = None,
    grey: int = 128,
) -> Picture:
    """Time to the right, pitch upwards, loudness as colour (magma: even steps look even, in grey as well).

    Args:
      limits: values shown darkest and brightest.
      hidden: bool [s f], places to show in grey.
    """
    low, high = limits
    level = np.clip((spectrogram - low) / max(high - low, 1e-6), 0, 1)
    level = np.nan_to_num(level * 255).astype(np.uint8)
    picture = cv2.applyColorMap(np.ascontiguousarray(level.T[::-1]), cv2.COLORMAP_MAGMA)[..., ::-1].copy()
    if hidden is not None:
        picture[hidden.T[::-1]] = grey
    return picture


def brightness_limits(spectrogram: Float[np.ndarray, '*s']) -> tuple[float, float]:
    """From the quiet to the loud: one extreme value must not turn all else dark."""
    finite = spectrogram[np.isfinite(spectrogram)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (2, 99.7))
    return float(low), float(high)


def look_at_sound(waveform: Int16[np.ndarray, 'l'], sample_rate: int) -> Float[np.ndarray, 's 96']:
    """A log-mel to look at, about 100 bins a second; training makes its own, in `ops/spectrogram.py`."""
    hop = max(1, sample_rate // 100)
    size = 4 * hop
    sound = np.pad(waveform.astype(np.float32) / 32768, (0, max(0, size - len(waveform))))
    starts = np.arange(0, len(sound) - size + 1, hop)
    pieces = sound[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(pieces, axis=-1)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + sample_rate / 2 / 700), 98)
    bins = 700 * (10 ** (mel / 2595) - 1) * size / sample_rate
    position = np.arange(power.shape[1])[None]
    rise = (position - bins[:-2, None]) / np.maximum(bins[1:-1] - bins[:-2], 1)[:, None]
    fall = (bins[2:, None] - position) / np.maximum(bins[2:] - bins[1:-1], 1)[:, None]
    bank = np.clip(np.minimum(rise, fall), 0, 1)
    return np.log(power @ bank.T + 1e-5).astype(np.float32)


# -- Curves --

NOISY_LENGTH = 120  # Curves of more values than this are smoothed.


class Curve(NamedTuple):
    """Attributes: steps: where; values: how much, with gaps where not finite."""

    steps: Sequence[float | int]
    values: Sequence[float | int]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two others: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a thirtieth of the curve, one-sided at its ends."""
    reach = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw_curves(
    curves: Mapping[str, Curve],
    title: str,
    marks: Mapping[str, float | int] | None = None,
    height: int = 420,
    width: int = 760,
    x_name: str = 'step',
) -> Picture:
    """Values over steps with axes, each curve named at its right end; noisy ones pale, with their running mean.

    Args:
      marks: name -> step of a dashed upright line, such as an interruption.
    """
    finite = {}
    for name, curve in curves.items():
        steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        keep = np.isfinite(values) & np.isfinite(steps)
        if keep.any():
            finite[name] = (steps[keep], values[keep])
    if not finite:
        raise ValueError(f'{title!r}: there is no finite value to draw.')
    picture = blank(height, width)
    left, right = 62, width - 24 - max(text_width(name) for name in finite)
    top, bottom = 34, height - 40
    all_steps = np.concatenate([steps for steps, _ in finite.values()])
    all_values = np.concatenate([values for _, values in finite.values()])
    x_low, x_high = float(all_steps.min()), float(all_steps.max())
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = float(all_values.min()), float(all_values.max())
    margin = 0.05 * (y_high - y_low) or max(abs(y_high) * 0.05, 1e-3)
    y_low, y_high = y_low - margin, y_high + margin

    def place(steps: np.ndarray | float | int, values: np.ndarray | float) -> np.ndarray:
        x = left + (np.asarray(steps) - x_low) / (x_high - x_low) * (right - left)
        y = bottom - (np.asarray(values) - y_low) / (y_high - y_low) * (bottom - top)
        return np.stack(np.broadcast_arrays(x, y), -1)

    put_text(picture, title, left, 20, scale=0.5)
    for value in _ticks(y_low, y_high, 6):
        y = round(float(place(x_low, value)[1]))
        cv2.line(picture, (left, y), (right, y), FAINT, 1)
        text = f'{value:.6g}'
        put_text(picture, text, left - 6 - text_width(text), y + 4)
    for step in _ticks(x_low, x_high, 7):
        x = round(float(place(step, y_low)[0]))
        cv2.line(picture, (x, bottom), (x, bottom + 4), INK, 1)
        text = f'{step:,.6g}'
        put_text(picture, text, x - text_width(text) // 2, bottom + 18)
    put_text(picture, x_name, (left + right - text_width(x_name)) // 2, height - 6)
    cv2.rectangle(picture, (left, top), (right, bottom), INK, 1)
    for name, step in (marks or {}).items():
        x = round(float(place(step, y_low)[0]))
        for y in range(top, bottom, 8):
            cv2.line(picture, (x, y), (x, min(y + 4, bottom)), (120, 120, 130), 1)
        start = min(x + 4, right - text_width(name, 0.36) - 2)
        put_text(picture, name, start, top + 13, (90, 90, 100), scale=0.36)

    ends, bold = [], []
    for colour, (name, (steps, values)) in zip(_cycle_colours(len(finite)), finite.items(), strict=True):
        if len(values) >= NOISY_LENGTH:
            _polyline(picture, place(steps, values), tuple((c + 2 * 255) // 3 for c in colour))
            values = _smooth(values)
        bold.append((place(steps, values), colour))
        ends.append((float(place(steps[-1], values[-1])[1]), name, colour))
    for points, colour in bold:  # On top of all that is pale.
        _polyline(picture, points, colour, thickness=2)
        if len(points) == 1:
            cv2.circle(picture, (round(float(points[0, 0])), round(float(points[0, 1]))), 3, colour, -1, cv2.LINE_AA)
    baseline = 0.0
    ends.sort()
    for i, (end, name, colour) in enumerate(ends):  # Names that would overlap move down, and leave room for the rest.
        lowest = bottom - (len(ends) - 1 - i) * (TEXT_HEIGHT - 2)
        baseline = min(max(end, baseline + TEXT_HEIGHT - 2), lowest)
        put_text(picture, name, right + 8, round(baseline) + 4, colour)
    return picture


def _cycle_colours(count: int) -> list[tuple[int, int, int]]:
    return [LINE_COLOURS[i % len(LINE_COLOURS)] for i in range(count)]


def _polyline(picture: np.ndarray, points: np.ndarray, colour: tuple[int, ...], thickness: int = 1) -> None:
    fixed = np.rint(points * 16).astype(np.int32).reshape(-1, 1, 2)  # Sixteenths of a pixel.
    cv2.polylines(picture, [fixed], False, colour, thickness, cv2.LINE_AA, shift=4)


# -- Confusion --

DARKEST = (8, 48, 107)
CELL_SIZES = (10, 44)  # Pixels: enough for the name of a class beside it, and for a number inside it.
NUM_CONFUSIONS = 12  # Of the most frequent ones, listed below.
MAX_NAME = 32  # Letters; of a longer name the first ones are shown.


def draw_confusion(counts: Float[np.ndarray, 'c c'], names: Sequence[str], title: str) -> Picture:
    """Which classes (rows) are taken for which (columns); darker is more, and what is right lies on the diagonal.

    Numbers stand in the cells where they have room, and all rows and columns are named, on both sides when there are
    many. The shade is the square root of the share of a row, so that a hundredth can be seen. Classes without a record
    are grey. Below are the confusions that happen most.
    """
    num_classes = len(names)
    cell = int(np.clip(600 // num_classes, *CELL_SIZES))
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1e-12)
    level = np.sqrt(shares)[..., None]
    colours = (1 - level) * np.array(PAPER) + level * np.array(DARKEST)
    colours[totals[:, 0] == 0] = FAINT
    matrix = np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    every = 1 if cell >= 20 else 10  # Lines that the eye can follow.
    matrix[:: cell * every], matrix[:, :: cell * every] = FAINT, FAINT
    if cell >= 26:
        for row, column in zip(*np.nonzero(counts), strict=True):
            text = f'{counts[row, column]:.4g}'
            colour = PAPER if level[row, column] > 0.6 else INK
            x = column * cell + (cell - text_width(text, 0.36)) // 2
            put_text(matrix, text, int(x), int(row) * cell + cell // 2 + 4, colour, scale=0.36)

    shown = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 2] + '..' for name in names]
    to_left, to_right = (_names_of_rows(shown, cell, right=right) for right in (False, True))
    corner = blank(to_left.shape[1], to_left.shape[1])
    # A quarter turn lets names read upwards, so that those above begin at the matrix and those below end there.
    lines = [[corner, np.rot90(to_right)], [to_left, matrix]]
    if cell < 20:
        lines = [[*lines[0], corner], [*lines[1], to_right], [corner, np.rot90(to_left), corner]]
    picture = below([beside([np.ascontiguousarray(part) for part in line], gap=0) for line in lines], gap=0)

    wrong = counts * (1 - np.eye(num_classes))
    most = np.argsort(-wrong, axis=None, kind='stable')[:NUM_CONFUSIONS]
    listed = [
        f'{names[i]} taken for {names[j]}: {wrong[i, j]:.4g} of {totals[i, 0]:.4g} ({100 * shares[i, j]:.0f} %)'
        for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    right = 100 * np.trace(counts) / max(totals.sum(), 1e-12)
    about = (
        f'{title}: rows are true classes, columns what they were taken for. {right:.1f} % of {totals.sum():.0f} right.'
    )
    zoom = max(1, picture.shape[1] // 1200)  # The text of a large picture is seen from afar.
    width = max(picture.shape[1] // zoom, 420)
    told = below([caption(line, width) for line in (about, *listed)], gap=0)
    told = resize(told, height=zoom * told.shape[0], width=zoom * told.shape[1])
    return np.pad(below([picture, told], gap=6), ((6, 6), (6, 6), (0, 0)), constant_values=255)


def _names_of_rows(names: Sequence[str], cell: int, right: bool) -> Picture:
    """Names to stand right or left of the rows of a matrix, close to it."""
    scale = 0.4 if cell >= 14 else 0.3
    width = max(text_width(name, scale) for name in names) + 8
    paper = blank(cell * len(names), width)
    for i, name in enumerate(names):
        x = 4 if right else width - 4 - text_width(name, scale)
        put_text(paper, name, x, i * cell + cell // 2 + round(10 * scale), scale=scale)
    return paper
