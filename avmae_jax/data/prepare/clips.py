"""One row of the list -> one record, or the reason why there is none.

What becomes of dirty media is decided here, by the options of the job, and nowhere else. `REASONS` is the
table of what can be wrong; `docs/data.md` shows it to people, and a test keeps the two the same.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from avmae_jax.data import schema
from avmae_jax.data.prepare import decode, encode
from avmae_jax.data.prepare import picture as picture_lib
from avmae_jax.data.prepare import sound as sound_lib
from avmae_jax.data.prepare.decode import MediaError, Problem
from avmae_jax.data.prepare.statistics import Sums
from avmae_jax.structs import Clip

SHORT_SECONDS = 0.5  # A clip that misses less than this (or a tenth) of what the list asks for is whole.


class Reason(NamedTuple):
    """Attributes:
    meaning: what is wrong.
    option: the setting that decides, or None when there is nothing to decide.
    """

    meaning: str
    option: str | None


REASONS = {
    'missing': Reason('the file that the list names is not there', None),
    'empty': Reason('the file has no bytes', None),
    'unreadable': Reason('no permission, a folder, a pipe, a play list, or no media at all', None),
    'timeout': Reason('it took longer than timeout_seconds; its process was killed', None),
    'crash': Reason('a decoder took its process down, twice', None),
    'memory': Reason('it needs more memory than memory_gb', None),
    'error': Reason('a library raised where it should not; please report it', None),
    'beyond_end': Reason('the clip starts behind the end of the file', None),
    'no_media': Reason('neither picture nor sound is left', None),
    'no_video': Reason('no video stream, a cover picture only, or no frame decodes', 'missing_video'),
    'too_large': Reason(f'the picture has more than {decode.MAX_PIXELS:,} pixels', 'missing_video'),
    'no_audio': Reason('no audio stream, or no sound decodes', 'missing_audio'),
    'silent': Reason('a sound track that never rises above the noise of its decoder', 'silent_audio'),
    'damaged': Reason('parts do not decode, were patched up, or have time stamps that cannot be right', 'damaged'),
    'short': Reason('the file, its picture or its sound ends before the clip does', 'short'),
    'duration': Reason('the header gives no length, or a smaller one than there is', None),
    'long': Reason('longer than max_seconds; only that much is stored', None),
}

OUTCOMES = {
    'missing_video': ('skip', 'fill'),
    'missing_audio': ('skip', 'fill'),
    'silent_audio': ('keep', 'skip', 'fill'),
    'damaged': ('keep', 'skip'),
    'short': ('keep', 'skip'),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards. A second run into the same folder must have the same.

    Attributes:
      modalities: those to store: ('audio', 'video'), one of them, or ('image',).
      codec, fps, short_side, jpeg_quality, gop: of the picture; short_side 0 keeps its size.
      clip_seconds: longer files and spans become several clips of this length; None: whole.
      max_seconds: the most that one clip may hold.
      missing_video ... short: what becomes of dirty media; the words are in OUTCOMES.
      timeout_seconds, memory_gb: what one clip may take.
      seed: of the order of clips.
    """

    modalities: tuple[str, ...] = ('audio', 'video')
    codec: str = 'jpeg'
    fps: float = 12.5
    short_side: int = 256
    jpeg_quality: int = 85
    gop: int = 12
    clip_seconds: float | None = None
    max_seconds: float = 600.0
    missing_video: str = 'skip'
    missing_audio: str = 'fill'
    silent_audio: str = 'fill'
    damaged: str = 'keep'
    short: str = 'keep'
    timeout_seconds: float = 120.0
    memory_gb: float = 8.0
    seed: int = 0

    def __post_init__(self):
        if self.codec not in schema.CODECS:
            raise ValueError(f'codec must be one of {schema.CODECS}; got {self.codec!r}.')
        for name, outcomes in OUTCOMES.items():
            if getattr(self, name) not in outcomes:
                raise ValueError(f'{name} must be one of {outcomes}; got {getattr(self, name)!r}.')
        if not 0.01 <= self.fps <= 1000:
            raise ValueError(f'fps must lie in [0.01, 1000]; got {self.fps}.')
        for name in ('max_seconds', 'timeout_seconds'):
            if not 0 < getattr(self, name) < float('inf'):
                raise ValueError(f'{name} must be a number above 0; got {getattr(self, name)}.')
        if not 1 <= self.memory_gb < 2**20:
            raise ValueError(f'memory_gb must be at least 1, which the decoders need; got {self.memory_gb}.')
        if self.clip_seconds is not None and not 0.1 <= self.clip_seconds <= self.max_seconds:
            raise ValueError(
                f'clip_seconds must lie in [0.1, max_seconds={self.max_seconds}]; got {self.clip_seconds}.'
            )
        if self.short_side and not 16 <= self.short_side <= 4096:
            raise ValueError(f'short_side must lie in [16, 4096], or be 0 to keep the size; got {self.short_side}.')
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f'jpeg_quality must lie in [1, 100]; got {self.jpeg_quality}.')
        if self.gop < 1:
            raise ValueError(f'gop must be at least 1; got {self.gop}.')

    @property
    def media(self) -> schema.MediaSettings:
        picture = {'video', 'image'} & set(self.modalities)
        image = 'image' in self.modalities
        return schema.MediaSettings(
            codec=('jpeg' if image else self.codec) if picture else None,
            fps=self.fps if 'video' in self.modalities else 0.0,
            short_side=self.short_side if picture else 0,
            jpeg_quality=self.jpeg_quality,
            sample_rate=sound_lib.SAMPLE_RATE,
            clip_seconds=self.clip_seconds,
            gop=self.gop,
        )


class ClipRow(NamedTuple):
    """One clip to make.

    Attributes:
      start, end: seconds; `end` None is the end of the file.
      labels: head -> class indices.
      trimmed: if the file is no longer than the clip, it is the clip, and times count from its start.
    """

    id: str
    path: str
    start: float
    end: float | None
    labels: dict[str, tuple[int, ...]]
    trimmed: bool = False


class Failure(NamedTuple):
    """A line of failures.csv. `outcome`: skipped, filled (stored with the medium flagged as absent) or kept."""

    split: str
    id: str
    path: str
    reason: str
    outcome: str
    detail: str


class ClipResult(NamedTuple):
    """What became of one row. `record` is None when it was skipped."""

    record: bytes | None
    failures: list[Failure]
    sums: Sums
    has: dict[str, bool]
    seconds: float = 0.0


class _Skip(Exception):
    """The clip is not stored; the reason is already in the list of failures."""


def make_clip(row: ClipRow, settings: Settings, split: str = '', measure: bool = True) -> ClipResult:
    """Reads, encodes and measures one clip. Media in any state give a result and never an exception."""
    sums = Sums()
    failures: list[Failure] = []

    def note(problem: Problem, outcome: str) -> None:
        failures.append(Failure(split, row.id, printable(row.path), problem.reason, outcome, printable(problem.detail)))
        if outcome == 'skipped':
            raise _Skip

    try:
        try:
            decode.check_file(row.path)
            make = _make_image if 'image' in settings.modalities else _make_audiovisual
            if row.trimmed and row.start > 0:
                row = resolve_trimmed(row, decode.probe_seconds(row.path))
            clip = make(row, settings, sums, note)
            record = schema.write_clip(clip)
        except MediaError as error:
            note(error.problem, 'skipped')
        except MemoryError:
            note(Problem('memory', f'more than {settings.memory_gb:g} GB'), 'skipped')
        except _Skip:
            raise
        except Exception as error:  # One strange file of two million must not end a job of three days.
            note(Problem('error', f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'), 'skipped')
        if measure and clip.waveform is not None:
            sums.add_waveform(clip.waveform)
    except _Skip:
        return ClipResult(None, failures, Sums(), {})
    return ClipResult(record, failures, sums if measure else Sums(), clip.has, clip.duration)


def resolve_trimmed(row: ClipRow, seconds: float | None) -> ClipRow:
    """Of a published list: tells the file of a whole video from one, `seconds` long, that was cut to the clip."""
    if not row.trimmed or row.end is None:
        return row
    span = row.end - row.start
    if row.start > 0 and seconds is not None and seconds <= 1.1 * span + 0.5 and seconds < row.end - 0.5:
        return row._replace(start=0.0, end=span, trimmed=False)
    return row._replace(trimmed=False)


def _make_image(row: ClipRow, settings: Settings, sums: Sums, note) -> Clip:
    rgb = picture_lib.read_image(row.path, settings.short_side)
    writer = encode.JpegWriter(settings.jpeg_quality)
    writer.write(rgb, 1)
    sums.add_frame(rgb)
    return Clip(
        id=row.id,
        frames=writer.frames,
        h264=b'',
        num_frames=1,
        fps=0.0,
        waveform=None,
        spectrogram=None,
        sample_rate=sound_lib.SAMPLE_RATE,
        duration=0.0,
        has={'image': True, 'audio': False},
        labels={head: list(indices) for head, indices in row.labels.items()},
    )


def _make_audiovisual(row: ClipRow, settings: Settings, sums: Sums, note) -> Clip:
    end = row.end
    if end is not None and end > row.start + settings.max_seconds + 1e-6:
        note(Problem('long', f'{end - row.start:.1f} s asked for'), 'kept')
        end = row.start + settings.max_seconds
    writer = encode.make_writer(settings.codec, settings.fps, settings.jpeg_quality, settings.gop)

    sound, picture = None, None
    no_sound, no_picture = None, None  # The problem, where one is wanted and not there.
    if 'audio' in settings.modalities:
        sound, no_sound = _read_sound(row, end, settings)
        if no_sound and no_sound.reason != 'beyond_end' and _choice(no_sound, settings) == 'skip':
            note(no_sound, 'skipped')  # Before the work on the picture.
    if 'video' in settings.modalities:
        hold_until = sound.seconds if sound else 0.0
        picture, no_picture = _read_picture(row, end, settings, writer, sums, hold_until)
    if sound is None and picture is None:
        problems = [problem for problem in (no_picture, no_sound) if problem]
        same = len({problem.reason for problem in problems}) == 1
        note(problems[0] if same else Problem('no_media', _reasons(problems)), 'skipped')
    for problem, default in ((no_sound, 'no_audio'), (no_picture, 'no_video')):
        if problem:
            if problem.reason == 'beyond_end':
                problem = Problem(default, problem.detail)
            note(problem, _outcome(_choice(problem, settings)))

    media = [medium for medium in (picture, sound) if medium]
    seconds = max(medium.seconds for medium in media)
    found = [problem for medium in media for problem in medium.problems]
    for problem in _once(found + _span_problems(row, end, settings, [medium.seconds for medium in media])):
        note(problem, _outcome(_choice(problem, settings)))
    if sound is not None and sound_lib.is_silent(sound.waveform) and settings.silent_audio == 'keep':
        note(Problem('silent', f'{sound.seconds:.2f} s'), 'kept')

    waveform = None
    if sound is not None:
        waveform = np.zeros(max(1, int(seconds * sound_lib.SAMPLE_RATE + 0.5)), np.int16)
        waveform[: len(sound.waveform)] = sound.waveform[: len(waveform)]
    return Clip(
        id=row.id,
        frames=writer.frames if picture else [],
        h264=writer.h264 if picture else b'',
        num_frames=picture.num_frames if picture else 0,
        fps=settings.fps if 'video' in settings.modalities else 0.0,
        waveform=waveform,
        spectrogram=None,
        sample_rate=sound_lib.SAMPLE_RATE,
        duration=seconds,
        has={'video': picture is not None, 'audio': sound is not None},
        labels={head: list(indices) for head, indices in row.labels.items()},
    )


def _read_sound(row: ClipRow, end: float | None, settings: Settings) -> tuple[sound_lib.Sound | None, Problem | None]:
    try:
        sound = sound_lib.read_sound(row.path, row.start, end, settings.max_seconds)
    except MediaError as error:
        if error.problem.reason not in ('no_audio', 'beyond_end'):
            raise
        return None, error.problem
    if settings.silent_audio != 'keep' and sound_lib.is_silent(sound.waveform):
        return None, Problem('silent', f'{sound.seconds:.2f} s')
    return sound, None


def _read_picture(
    row: ClipRow, end: float | None, settings: Settings, writer, sums: Sums, hold_until: float
) -> tuple[picture_lib.Picture | None, Problem | None]:
    def write(rgb: np.ndarray, repeats: int) -> None:
        writer.write(rgb, repeats)
        sums.add_frame(rgb, repeats)

    try:
        picture = picture_lib.read_picture(
            row.path,
            row.start,
            end,
            fps=settings.fps,
            short_side=settings.short_side,
            write=write,
            max_seconds=settings.max_seconds,
            hold_until=hold_until,
        )
    except MediaError as error:
        if error.problem.reason not in ('no_video', 'too_large', 'beyond_end'):
            raise
        return None, error.problem
    writer.finish()
    return picture, None


def _span_problems(row: ClipRow, end: float | None, settings: Settings, seconds: list[float]) -> list[Problem]:
    """Where the media end, against what the list asks for and against each other."""
    longest = max(seconds)
    wanted = longest if end is None else end - row.start
    if wanted - min(seconds) > max(SHORT_SECONDS, 0.1 * wanted):
        return [Problem('short', f'{" and ".join(f"{x:.2f}" for x in seconds)} s of {wanted:.2f} s')]
    if end is None and longest >= settings.max_seconds - 1 / settings.fps:
        return [Problem('long', f'only the first {settings.max_seconds:g} s are stored')]
    return []


def _reasons(problems: Iterable[Problem]) -> str:
    return '; '.join(f'{problem.reason}: {problem.detail}' for problem in problems)


def _choice(problem: Problem, settings: Settings) -> str:
    """'keep', 'fill' or 'skip'. A dataset of one modality cannot fill it: there would be nothing left."""
    option = REASONS[problem.reason].option
    choice = getattr(settings, option) if option else 'keep'
    return 'skip' if choice == 'fill' and len(settings.modalities) == 1 else choice


def _outcome(choice: str) -> str:
    return {'skip': 'skipped', 'fill': 'filled', 'keep': 'kept'}[choice]


def _once(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of each reason: picture and sound of one file often share theirs."""
    found: dict[str, Problem] = {}
    for problem in problems:
        found.setdefault(problem.reason, problem)
    return list(found.values())


def printable(text: str) -> str:
    """Text that can be written as UTF-8, whatever bytes a file name was made of."""
    return text.encode('utf-8', 'backslashreplace').decode()


def failures_csv(failures: Iterable[Failure]) -> str:
    file = io.StringIO()
    writer: Any = csv.writer(file, lineterminator='\n')
    writer.writerow(Failure._fields)
    writer.writerows([printable(str(value)) for value in failure] for failure in failures)
    return file.getvalue()
