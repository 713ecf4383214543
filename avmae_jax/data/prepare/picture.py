"""Pictures of a file: frames at even times from a video, or the one of an image; upright, RGB, of one size."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from avmae_jax.data.prepare import decode

EDGE_SECONDS = 1e-3  # Frame times are rounded to their time base; a frame this close counts as due.


@dataclasses.dataclass
class Picture:
    """What a pass over the picture gave to its writer: `seconds` shown, from the clip's start on."""

    seconds: float
    num_frames: int
    problems: list[decode.Problem]


def target_size(width: int, height: int, aspect: float, short_side: int) -> tuple[int, int]:
    """(width, height) to store: short side at most `short_side` (0: as it is), even, pixels made square.

    Nothing is enlarged. The long side is kept below 4 short sides: a strip 10,000 wide would make
    every batch it is in as large as a film.
    """
    wide = width * aspect
    scale = min(1.0, short_side / min(wide, height)) if short_side else 1.0
    limit = 4 * (short_side or max(256, min(wide, height)))
    scale = min(scale, limit / max(wide, height))

    def even(side: float | int) -> int:
        return max(2, 2 * int(side * scale / 2 + 0.5))

    return even(wide), even(height)


def _pixel_aspect(stream) -> float:
    ratio = stream.sample_aspect_ratio
    aspect = float(ratio) if ratio else 1.0
    return aspect if 0.25 <= aspect <= 4.0 else 1.0


def _colour_space(frame: av.VideoFrame) -> Any:
    # What does not say is by custom BT.709 where it is high definition and BT.601 where not.
    if frame.colorspace in (1, 4, 5, 6, 7):
        return frame.colorspace
    return 'ITU709' if frame.height >= 720 else 'ITU601'


def _orientation(frame: av.VideoFrame) -> tuple[bool, int]:
    """(whether left and right are to be swapped, quarter turns to the left after that), as the file asks for."""
    turns = round(frame.rotation / 90) % 4
    matrix: Any = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return False, turns
    a, b, _, c, d = struct.unpack_from('=5i', bytes(matrix))
    # `rotation` is the direction of (a, b), which a mirror has the other way round.
    return (True, (turns + 2) % 4) if a * d < b * c else (False, turns)


class _Shaper:
    """Frames of any format -> RGB of one size, upright."""

    def __init__(self, stream, short_side: int):
        self._aspect = _pixel_aspect(stream)
        self._short_side = short_side
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None  # Upright; fixed by the first frame.

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        mirrored, turns = _orientation(frame)
        if self._size is None:
            width, height = target_size(frame.width, frame.height, self._aspect, self._short_side)
            self._size = (height, width) if turns % 2 else (width, height)
        width, height = self._size[::-1] if turns % 2 else self._size
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format='rgb24',
            src_colorspace=_colour_space(frame),
            interpolation='BICUBIC',
            threads=1,
        ).to_ndarray()
        if mirrored:
            rgb = rgb[:, ::-1]
        return np.ascontiguousarray(np.rot90(rgb, turns))


def read_picture(
    path: str,
    start: float,
    end: float | None,
    fps: float,
    short_side: int,
    write: Callable[[np.ndarray, int], None],
    max_seconds: float,
    hold_until: float = 0.0,
) -> Picture:
    """Hands the frame shown at start + i / fps, i = 0, 1, ..., to `write(rgb, repeats)`.

    Sampling is by time stamp, so that a variable frame rate comes out even; a frame shown for longer
    than 1 / fps is handed over once, with how often it counts. The last one is held until `hold_until`.

    Args:
      end: seconds; None for the end of the file. Not later than start + max_seconds.
      hold_until: seconds from `start`; where the sound ends.
    """
    stop = start + max_seconds if end is None else min(end, start + max_seconds)
    problems: list[decode.Problem] = []
    with contextlib.closing(decode.attempts(path, 'video', start)) as attempts:
        for container, stream, seek in attempts:
            picture = _read_picture_stream(
                container, stream, seek, start, stop, fps, short_side, write, end is not None, hold_until
            )
            if picture is not None and picture.num_frames:
                return picture
            problems = picture.problems if picture is not None else problems
            if any(problem.reason == 'beyond_end' for problem in problems):
                break  # To decode an hour from the front would find the same.
    for problem in problems:
        if problem.reason in ('too_large', 'beyond_end'):
            raise decode.MediaError(problem.reason, problem.detail)
    raise decode.MediaError('no_video', '; '.join(p.detail for p in problems)[:200] or 'no frame decodes')


def _read_picture_stream(
    container: av.container.InputContainer,
    stream: Any,
    seek: bool,
    start: float,
    stop: float,
    fps: float,
    short_side: int,
    write: Callable[[np.ndarray, int], None],
    bounded: bool,
    hold_until: float,
) -> Picture | None:
    damage: list[str] = []
    context: Any = stream.codec_context
    if context is None:
        return Picture(0.0, 0, [decode.Problem('damaged', 'its codec is unknown')])
    if context.width * context.height > decode.MAX_PIXELS:
        return Picture(0.0, 0, [decode.Problem('too_large', f'{context.width} x {context.height} pixels')])
    context.options = {'max_pixels': str(decode.MAX_PIXELS)}
    zero = decode.first_time(container)
    try:
        decode.start_stream(container, stream, start + zero if seek else 0.0)
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    claimed = decode.header_seconds(container)
    shape = _Shaper(stream, short_side)
    usual = 1 / float(stream.average_rate) if stream.average_rate else 1 / fps
    usual = min(max(usual, 1e-3), 10.0)
    wanted = int((stop - start) * fps + 0.5)  # Frames at most.
    done, seen = 0, 0
    current: av.VideoFrame | None = None
    last_time, last_seconds = -float('inf'), usual
    frames = decode.decoded(container, stream, stop + zero, damage, from_front=not seek)
    for frame in decode.in_order(frames, damage):
        seen += 1
        # A frame without a time stamp comes one usual step after the last.
        time = frame.time - zero if frame.time is not None else max(last_time, -usual) + usual
        if seek and seen == 1 and time > start + EDGE_SECONDS and time > usual:
            return None  # The seek went past the start: once more, from the front.
        if time <= last_time:
            continue  # Time that runs backwards shows nothing new.
        if current is None and time >= stop:
            return Picture(0.0, 0, [decode.Problem('late', f'the picture begins at {time:.2f} s')])
        if current is not None:
            due = int(np.ceil((time - start - EDGE_SECONDS) * fps))  # Samples that fall before this frame.
            due = min(due, wanted)
            if due > done:
                write(shape(current), due - done)
                done = due
        last_seconds = usual if current is None else min(max(time - last_time, 1e-3), 10.0)
        current, last_time = frame, time
        if done >= wanted or time >= stop:
            break
    if current is None:
        return Picture(0.0, 0, [decode.Problem('damaged', detail) for detail in damage[:1]])
    shown_until = min(last_time + last_seconds, stop) - start
    if shown_until <= EDGE_SECONDS and not done:
        return Picture(0.0, 0, [decode.Problem('beyond_end', f'the picture ends at {last_time + last_seconds:.2f} s')])
    ended = done < wanted and last_time < stop
    total = min(wanted, max(int(max(shown_until, hold_until) * fps + 0.5), 1)) if wanted else 1
    if total > done:  # Also where the picture began late: its first frame stands for the time before.
        write(shape(current), total - done)
        done = total
    problems = []
    if damage:
        problems.append(decode.Problem('damaged', f'{len(damage)} times: {damage[0]}'))
    if ended and not bounded:
        problems += decode.length_problems(claimed, start + shown_until)
    return Picture(seconds=max(shown_until, 0.0), num_frames=done, problems=problems)


def read_image(path: str, short_side: int) -> np.ndarray:
    """The one picture of an image file, upright by its EXIF flag, RGB; transparency is dropped."""
    with open(path, 'rb') as file:
        data = np.frombuffer(file.read(), np.uint8)
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise decode.MediaError(
            'too_large' if 'pixels' in str(error) else 'no_video', decode.error_text(error)
        ) from error
    if bgr is None:
        raise decode.MediaError('no_video', 'not an image that OpenCV reads')
    height, width = bgr.shape[:2]
    size = target_size(width, height, 1.0, short_side)
    if size != (width, height):
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
