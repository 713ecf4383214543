"""Where figures and pictures of a run go: TensorBoard event files and `metrics.jsonl`, behind the method names of clu.

clu's own writers import TensorFlow. This one has the same methods, so that code written for
`clu.metric_writers.MetricWriter` can be handed either.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
import wave
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from absl import logging
from etils import epath

from avmae_jax import whole


@contextlib.contextmanager
def _as_if_not_installed(name: str) -> Iterator[None]:
    """Inside, importing the package fails, unless it was imported before."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


# tensorboardX imports torch wherever there is one: two seconds of every start, for the type of a tensor.
with _as_if_not_installed('torch'):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import hparams as hparams_summary
    from tensorboardX.summary import text as text_summary

METRICS_FILE = 'metrics.jsonl'


class _Lines:
    """A text file that grows; in an object store each flush writes the whole text."""

    def __init__(self, path: epath.Path):
        self._path = path
        stored = whole.text_in_store(path)
        self._file = path.open('a') if stored is None else None
        self._text = stored or ''
        self._changed = False

    def write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
        else:
            self._text += line
            self._changed = True

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        elif self._changed:
            self._path.write_text(self._text)
            self._changed = False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricWriter:
    """Writes into `workdir`; the files read as if the run had never been interrupted.

    Attributes:
      start_step: steps that are done; this process goes on from there. Lines of later steps, which were written
        before a kill, are dropped: those steps run again.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int = 0):
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = self._workdir / METRICS_FILE
        _drop_lines(self._metrics, start_step)
        self._lines = _Lines(self._metrics)
        # The event writer that tensorboardX puts on top of this one blocks for ever once its thread met a full disk.
        self._events = EventsWriter(os.fspath(self._workdir / 'events'), f'.{os.getpid()}')
        if start_step:
            self._add(Event(session_log=SessionLog(status=SessionLog.START)), start_step + 1)

    def _add(self, event: Event, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = step
        self._events.write_event(event)

    def _add_values(self, step: int, values: list[Summary.Value]) -> None:
        self._add(Event(summary=Summary(value=values)), step)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        # A float32 written as the shortest text of its double reads back as the same bits.
        line = {'step': step} | {name: _for_json(value) for name, value in values.items()}
        self._lines.write(json.dumps(line) + '\n')
        self._add_values(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images are [n h w c] or [h w c], uint8 or float in [0, 1], of 1 or 3 channels."""
        values = []
        for name, image in images.items():
            image = np.asarray(image)
            stack = image[None] if image.ndim == 3 else image
            for i, picture in enumerate(stack):
                tag = name if len(stack) == 1 else f'{name}/{i}'
                height, width, channels = picture.shape
                encoded = Summary.Image(
                    height=height, width=width, colorspace=channels, encoded_image_string=encode_png(picture)
                )
                values.append(Summary.Value(tag=tag, image=encoded))
        self._add_values(step, values)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Audios are float [n samples channels] in [-1, 1]."""
        values = []
        for name, audio in audios.items():
            for i, sound in enumerate(np.asarray(audio)):
                encoded = Summary.Audio(
                    sample_rate=sample_rate,
                    num_channels=sound.shape[1],
                    length_frames=sound.shape[0],
                    encoded_audio_string=encode_wav(sound, sample_rate),
                    content_type='audio/wav',
                )
                values.append(Summary.Value(tag=f'{name}/{i}', audio=encoded))
        self._add_values(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._add(Event(summary=text_summary(name, text)), step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        simple = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hparams.items()
        }
        for summary in hparams_summary(simple, {}):
            self._add(Event(summary=summary), None)

    def flush(self) -> None:
        self._lines.flush()
        self._events.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._lines.close()
            self._events.close()


def _for_json(value: float) -> float | str:
    """JSON has no word for what is not finite; a string keeps the line readable by every parser."""
    return value if math.isfinite(value) else str(value)


def read_scalars(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in their order; a last line that was cut off is left out."""
    lines = []
    for line in (epath.Path(workdir) / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _drop_lines(path: epath.Path, start_step: int) -> None:
    if not path.exists():
        return
    lines = read_scalars(path.parent)
    kept = [line for line in lines if line['step'] <= start_step]
    new = path.parent / (path.name + '.new')
    new.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    new.replace(path)
    if len(kept) < len(lines):
        logging.info(
            'Dropped %d lines of %s behind step %d: these steps run again.', len(lines) - len(kept), path, start_step
        )


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of [h w 1 or 3], uint8 or float in [0, 1]; RGB."""
    if image.dtype != np.uint8:
        image = np.clip(np.nan_to_num(image) * 255 + 0.5, 0, 255).astype(np.uint8)
    if image.shape[-1] not in (1, 3):
        raise ValueError(f'An image of shape {image.shape} cannot be written as PNG: it needs 1 or 3 channels.')
    _, encoded = cv2.imencode('.png', image[..., ::-1] if image.shape[-1] == 3 else image)
    return encoded.tobytes()


def encode_wav(sound: np.ndarray, sample_rate: int) -> bytes:
    """16-bit WAV bytes of float [samples channels] in [-1, 1]."""
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as file:
        file.setnchannels(sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype('<i2').tobytes())
    return buffer.getvalue()


class NullWriter:
    """Takes everything and keeps nothing: the writer of all processes but the first."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...
    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...
    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None: ...
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
