"""Opening a media file and decoding a stream of it, whatever state the file is in.

`picture.py` and `sound.py` make frames at even times and a 16 kHz waveform of it. Nothing in the three
decides what becomes of a clip: what was wrong is reported as `Problem`s, and `clips.py` weighs them by the
options of the job. Pictures and sound are read in two
passes over the file, each with a container of its own, so that an error in one cannot spoil the other.
Decoders run with one thread: frame threading costs more and can hang.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal

import av

MAX_PIXELS = 1 << 26  # 8,192 x 8,192: no camera's picture is larger, but a damaged header easily is.
MAX_ERRORS = 2_000  # Packets that fail one after another before a stream counts as over.
BEHIND_SECONDS = 120.0  # How far another stream may run past the end before we stop waiting for ours.
BEHIND_PACKETS = 20  # One that far off alone has a damaged time stamp.
JUMP_SECONDS = 10.0  # A frame that jumps so far ahead counts only if the next one is there too.
BACK_SECONDS = 1.0  # Frames further back than this behind the last one are of another recording.
MIN_BYTES_PER_SECOND = 1_000  # Where a header claims more seconds than this allows, the packets are asked.
MAX_GAP_SECONDS = 600.0  # Packets that are further from all before them have damaged time stamps.

# Play lists name other files, or addresses in a network; they are no media.
REFUSED_FORMATS = {'hls', 'dash', 'concat', 'sdp', 'rtsp', 'lavfi', 'imf', 'webm_dash_manifest'}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What was wrong with a file; `reason` is a key of `clips.REASONS` by the time it leaves a reader."""

    reason: str
    detail: str = ''


class MediaError(Exception):
    """The file gives nothing at all; carries the reason."""

    def __init__(self, reason: str, detail: str = ''):
        super().__init__(f'{reason}: {detail}')
        self.problem = Problem(reason, detail)


def check_file(path: str) -> None:
    """Raises `MediaError` for what is no readable file with bytes in it. Never blocks, as opening a pipe would."""
    try:
        status = os.stat(path)
    except OSError as error:  # Also a loop of links.
        raise MediaError('missing' if isinstance(error, FileNotFoundError) else 'unreadable', str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError('unreadable', 'a folder' if stat.S_ISDIR(status.st_mode) else 'not a plain file')
    if status.st_size == 0:
        raise MediaError('empty', '0 bytes')
    if not os.access(path, os.R_OK):
        raise MediaError('unreadable', 'no permission to read it')


def open_container(path: str) -> av.container.InputContainer:
    try:
        container = av.open(
            f'file:{path}', metadata_errors='replace', options={'protocol_whitelist': 'file', 'max_streams': '256'}
        )
    except (av.error.FFmpegError, OSError, ValueError, UnicodeError) as error:
        raise MediaError('unreadable', error_text(error)) from error
    if set(container.format.name.split(',')) & REFUSED_FORMATS:
        name = container.format.name
        container.close()
        raise MediaError('unreadable', f'a play list ({name}), not media')
    return container


def error_text(error: BaseException) -> str:
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return ' '.join(str(text).split())[:200]


def is_still(container: av.container.InputContainer) -> bool:
    """A picture file, which ffmpeg opens as a video of one frame."""
    name = container.format.name
    return name.endswith('_pipe') or name in ('image2', 'ico', 'tiff')


def header_seconds(container: av.container.InputContainer) -> float | None:
    """How long the file says it is; None where it does not say, or says nonsense."""
    if container.duration is None or container.duration <= 0:
        return None
    if container.format.name in ('aac', 'loas'):
        return None  # Has no header; ffmpeg guesses by the size of the first packets.
    if container.format.name.startswith('matroska') and first_time(container) > 1.0:
        return None  # Some count from 0, some from the first time.
    return container.duration / av.time_base


def probe_seconds(path: str) -> float | None:
    """How long a file is by its header, or by its packets where the header cannot be right; decodes nothing.

    None when there is nothing that has a length.
    """
    check_file(path)
    with open_container(path) as container:
        claimed = header_seconds(container)
        if claimed is not None and claimed * MIN_BYTES_PER_SECOND <= os.path.getsize(path):
            return claimed
        return last_end(container.demux(), first_time(container)) or claimed


def last_end(packets: Iterable[Any], zero: float) -> float:
    """Seconds from `zero` to the end of the last packet of picture or sound."""
    ended = 0.0
    with contextlib.suppress(av.error.FFmpegError, OSError, ValueError):
        for packet in packets:
            if packet.stream.type not in ('video', 'audio') or packet.time_base is None:
                continue
            # Bare h264 has no times: picture comes after picture.
            begin = float(packet.pts * packet.time_base) - zero if packet.pts is not None else ended
            end = begin + float((packet.duration or 0) * packet.time_base)
            if end <= ended + MAX_GAP_SECONDS:
                ended = max(ended, end)
    return ended


def candidates(container: av.container.InputContainer, kind: Literal['video', 'audio']) -> list:
    """Streams of a kind, the one that players would choose first. Cover art is no video."""
    streams = [
        stream
        for stream in container.streams
        if stream.type == kind and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    best = container.streams.best(kind)
    return sorted(streams, key=lambda stream: (best is None or stream.index != best.index, stream.index))


def attempts(
    path: str, kind: Literal['video', 'audio'], start: float
) -> Generator[tuple[av.container.InputContainer, Any, bool], None, None]:
    """(container, stream, whether to seek to `start`), the most promising first, until one of them works.

    Each has a container in its first state. To open one costs up to 30 ms, so the first serves to look for
    streams too.
    """
    seeks = (True, False) if start > 0 else (False,)
    with open_container(path) as container:
        indices = [stream.index for stream in candidates(container, kind)]
        if kind == 'video' and is_still(container):
            raise MediaError('no_video', 'a still picture')
        if not indices:
            raise MediaError(f'no_{kind}', f'no {kind} stream')
        tries = [(index, seek) for index in indices for seek in seeks]
        index, seek = tries[0]
        yield container, container.streams[index], seek
    for index, seek in tries[1:]:
        with open_container(path) as container:
            yield container, container.streams[index], seek


def first_time(container: av.container.InputContainer) -> float:
    """The time that counts as 0: some containers begin at 1.4 s, or just below 0."""
    return container.start_time / av.time_base if container.start_time is not None else 0.0


def packets_of(index: int, packets: Iterable[Any], end: float) -> Iterator[Any]:
    """Those of one stream; ends once other streams have run far past `end` without one of ours."""
    num_behind = 0
    for packet in packets:
        if packet.stream_index == index:
            num_behind = 0
            yield packet
        elif packet.stream.type in ('video', 'audio') and packet.dts is not None and packet.time_base is not None:
            # Only these run along with ours; some files have all subtitles at the front.
            num_behind += float(packet.dts * packet.time_base) > end + BEHIND_SECONDS
            if num_behind > BEHIND_PACKETS:
                return


def decoded(
    container: av.container.InputContainer, stream: Any, end: float, damage: list[str], from_front: bool
) -> Iterator[Any]:
    """Frames of `stream`; what does not decode is noted in `damage` and passed over.

    Args:
      from_front: nothing was skipped by seeking. Behind a seek, decoders call frames corrupt by the hundred
        that look fine, so there only packets that fail count.
    """
    packets = packets_of(stream.index, container.demux(), end)
    failed_in_a_row, ended = 0, False
    while not ended:
        frames: list[Any] = []
        try:
            # No frame is handed out in here: an error of whoever takes it is no damage of the file.
            packet = next(packets, None)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            damage.append(error_text(error))
            packet = None
        try:
            if packet is None:
                ended = True
                frames = stream.codec_context.decode(None)  # What the decoder still holds back.
                for frame in frames:
                    frame.time_base = stream.time_base
            else:
                frames = packet.decode()
            failed_in_a_row = 0
        except MemoryError:
            raise
        except av.error.EOFError:
            pass
        except (av.error.FFmpegError, OSError, ValueError, AttributeError) as error:
            # AttributeError: a stream that turns out to be of another kind while it is read.
            damage.append(error_text(error))
            failed_in_a_row += 1
            ended = ended or failed_in_a_row > MAX_ERRORS
        for frame in frames:
            if from_front and getattr(frame, 'is_corrupt', False):
                damage.append('frames patched up by the decoder')
            yield frame


def in_order(frames: Iterator[Any], damage: list[str]) -> Iterator[Any]:
    """Passes over frames whose time stamps cannot be right, and over another recording appended to the first.

    Such begin at 0 again: their pictures would be left out for that and their sound put over the first one's.
    """
    last: float | None = None
    held = None  # A frame far ahead of the last one, until the next shows whether time has gone there.
    back = False
    for frame in frames:
        time = frame.time
        if time is None:
            yield frame
            continue
        if held is not None:
            assert last is not None
            if time < held.time - BACK_SECONDS:
                damage.append(f'a time stamp of {held.time:.2f} s amid those around {last:.2f} s')
            else:
                yield held
                last = held.time
            held = None
        back = last is not None and (time <= last if back else time < last - BACK_SECONDS)
        if back:
            damage.append(f'after {last:.2f} s time goes back to {time:.2f} s; what follows is left out')
        elif last is not None and time > last + JUMP_SECONDS:
            held = frame
        else:
            last = max(time, last) if last is not None else time
            yield frame
    if held is not None:
        yield held


def start_stream(container: av.container.InputContainer, stream: Any, at: float) -> None:
    stream.codec_context.thread_count = 1
    stream.thread_type = 'NONE'
    if at > 0:
        container.seek(int(at * av.time_base), backward=True, any_frame=False)


def length_problems(claimed: float | None, ended: float) -> list[Problem]:
    """What the header says against what there was: cut files claim more, wrong headers anything."""
    if claimed is None:
        return [Problem('duration', 'the file does not say how long it is')]
    tolerance = max(1.0, 0.1 * ended)
    text = f'the file says {claimed:.2f} s and ends after {ended:.2f} s'
    if claimed > ended + tolerance:
        return [Problem('short', text)]
    return [Problem('duration', text)] if claimed < ended - tolerance else []
