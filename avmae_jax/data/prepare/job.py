"""The whole job: list -> plan -> shards -> dataset.json. `prepare.py` is its command line."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avmae_jax import progress as progress_lib
from avmae_jax.data import schema
from avmae_jax.data.prepare import lists, shards, workers
from avmae_jax.data.prepare.clips import ClipRow, Failure, Settings, failures_csv, printable, resolve_trimmed
from avmae_jax.data.prepare.manifest import Manifest, order_rows
from avmae_jax.data.prepare.place import PLAN_FILE, OnDisk, choose_place
from avmae_jax.data.prepare.statistics import Sums

# What a clip may take says nothing of what it becomes: these may change between two runs.
FREE_SETTINGS = ('timeout_seconds', 'memory_gb')
SAMPLE_CLIPS = 16
SHARD_MB = 256.0
MIN_SHARDS = 16  # Even of small data, so that many processes can write and many hosts read...
MIN_SHARD_CLIPS = 16  # ... but not of fewer clips than this.


class Sample(NamedTuple):
    """A few clips, prepared to know what the rest will take. Totals over `num_clips` tried."""

    num_clips: int
    num_bytes: int
    seconds: float
    failures: list[Failure]


class Plan(NamedTuple):
    """What the folder will hold; written first, so that a second run can be held against it."""

    name: str
    settings: dict[str, Any]
    num_shards: dict[str, int]
    num_rows: dict[str, int]
    rows_sha256: str


class Summary(NamedTuple):
    """What a finished job has to say."""

    info: schema.DatasetInfo
    failures: list[Failure]
    num_rows: int
    seconds: float
    clips_written: int


def choose_modalities(manifest: Manifest, asked: str) -> tuple[str, ...]:
    """'auto' goes by the extensions of the files: all images, all sounds, or pictures with sound."""
    choices = {
        'video+audio': ('audio', 'video'),
        'audio+video': ('audio', 'video'),
        'video': ('video',),
        'audio': ('audio',),
        'image': ('image',),
    }
    if asked in choices:
        return choices[asked]
    if asked != 'auto':
        raise ValueError(f'modalities must be auto or one of {sorted(choices)}; got {asked!r}.')
    kinds = set(manifest.kinds)
    if kinds <= lists.IMAGE_EXTENSIONS:
        return ('image',)
    if kinds <= lists.AUDIO_EXTENSIONS:
        return ('audio',)
    return ('audio', 'video')


PROBE_ROWS = 64  # Rows of a probing task: small, for the processes to end together.
MAX_PIECES = 1_000_000  # Of one row: a list that asks for more has a mistake in its times.


def cut_rows(found: Manifest, settings: Settings, num_workers: int) -> Manifest:
    """Rows longer than `clip_seconds` become several; a rest of less than half a clip is left out.

    Where the list does not say when a clip ends, its file is asked: the header, and the packets where that cannot be
    right. A length that is too large all the same gives clips that start behind the end: failures like any other.
    """
    if settings.clip_seconds is None or 'image' in settings.modalities:
        return found
    rows = [row for split in found.splits.values() for row in split]
    asked = [row for row in rows if row.end is None or row.trimmed]
    lengths: dict[str, float | None] = {}
    tasks = [shards.ProbeTask(asked[i : i + PROBE_ROWS], settings) for i in range(0, len(asked), PROBE_ROWS)]
    results: dict[int, list[float | None]] = {id(task): [] for task in tasks}
    if tasks:
        with progress_lib.progress(len(asked), what='asking for lengths', unit='files') as bar:

            def on_row(task: shards.ProbeTask, seconds: float | None) -> None:
                results[id(task)].append(seconds)
                bar.update()

            workers.run_tasks(tasks, num_workers, on_row)
    for task in tasks:
        lengths.update((row.id, seconds) for row, seconds in zip(task.rows, results[id(task)], strict=True))
    splits = {}
    for split, rows in found.splits.items():
        pieces = [piece for row in rows for piece in _cut(row, lengths.get(row.id), settings.clip_seconds)]
        splits[split] = order_rows(pieces, split, settings.seed)
    return found._replace(splits=splits)


def _cut(row: ClipRow, seconds: float | None, length: float) -> list[ClipRow]:
    row = resolve_trimmed(row, seconds)
    end = row.end if row.end is not None else seconds
    if end is None:
        return [row._replace(end=row.start + length)]
    count = int((end - row.start) / length + 0.5)
    if count > MAX_PIECES:
        raise ValueError(
            f'clip_seconds={length:g} makes {count:,} clips of {printable(row.path)} from {row.start:g} to {end:g} s; '
            f'{MAX_PIECES:,} are the most. Mend its times in the list, or leave it out.'
        )
    if count <= 1:
        return [row._replace(end=None if row.end is None else min(row.end, row.start + length))]
    starts = [row.start + i * length for i in range(count)]
    return [
        row._replace(id=f'{row.id}@{start - row.start:g}', start=start, end=min(start + length, end))
        for start in starts
    ]


def take_sample(manifest: Manifest, settings: Settings, num_workers: int) -> Sample:
    """Prepares a few clips from all over the list into nowhere."""
    rows = [row for split in manifest.splits.values() for row in split]
    chosen = rows[:: max(1, len(rows) // SAMPLE_CLIPS)][:SAMPLE_CLIPS]
    done: list[shards.RowDone] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / shards.STATE_FOLDER).mkdir()
        parts = [chosen[i::num_workers] for i in range(min(num_workers, len(chosen)))]
        tasks = [
            shards.ShardTask(folder, f'sample-{i}', '', part, settings, measure=True) for i, part in enumerate(parts)
        ]
        times: list[float] = []

        def on_row(task: shards.ShardTask, row: shards.RowDone) -> None:
            times.append(time.monotonic())
            done.append(row)

        begin = time.monotonic()
        workers.run_tasks(tasks, num_workers, on_row)
    # From the first result on, when all are there: processes take a moment to start, but only once.
    many = len(times) >= 4 * len(tasks)
    seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1) if many else times[-1] - begin
    failures = [failure for row in done for failure in row.failures]
    return Sample(len(chosen), sum(row.num_bytes for row in done), seconds, failures)


def count_shards(num_rows: int, bytes_per_clip: float, num_shards: int | None, shard_mb: float) -> int:
    if num_shards is not None:
        return max(1, min(num_shards, num_rows))
    by_size = int(num_rows * bytes_per_clip / (shard_mb * 1e6)) + 1
    return max(1, min(max(by_size, min(MIN_SHARDS, num_rows // MIN_SHARD_CLIPS)), num_rows))


def make_plan(
    manifest: Manifest, settings: Settings, name: str, num_shards: int | None, shard_mb: float, num_workers: int
) -> Plan:
    sample = take_sample(manifest, settings, num_workers) if num_shards is None else None
    per_clip = sample.num_bytes / sample.num_clips if sample else 0.0
    return Plan(
        name=name,
        settings=dataclasses.asdict(settings),
        num_shards={
            split: count_shards(len(rows), per_clip, num_shards, shard_mb) for split, rows in manifest.splits.items()
        },
        num_rows={split: len(rows) for split, rows in manifest.splits.items()},
        rows_sha256=manifest.digest(),
    )


def read_plan(folder: Path) -> Plan | None:
    file = folder / shards.STATE_FOLDER / PLAN_FILE
    if not file.exists():
        return None
    try:
        plan = Plan(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{file} cannot be read ({error}); remove {folder} and prepare again.') from error
    return plan._replace(settings={k: tuple(v) if isinstance(v, list) else v for k, v in plan.settings.items()})


def check_same_job(
    output: str, plan: Plan, manifest: Manifest, settings: Settings, name: str, num_shards: int | None
) -> None:
    """A folder holds one dataset: another run into it must be the same job. Names what is different."""
    wanted = dataclasses.asdict(settings)
    differing = [
        f'{key} was {plan.settings.get(key)!r} and is now {wanted[key]!r}'
        for key in wanted
        if key not in FREE_SETTINGS and plan.settings.get(key) != wanted[key]
    ]
    if plan.name != name:
        differing.append(f'name was {plan.name!r} and is now {name!r}')
    if num_shards is not None:
        for split, rows in manifest.splits.items():
            count = count_shards(len(rows), 0.0, num_shards, SHARD_MB)
            if plan.num_shards.get(split, count) != count:
                differing.append(f'num_shards of {split} was {plan.num_shards[split]} and is now {count}')
    now = {split: len(rows) for split, rows in manifest.splits.items()}
    if not differing and plan.rows_sha256 != manifest.digest():
        differing.append(
            f'the clips are others (then {plan.num_rows}, now {now}: other lists or labels, or files came or went)'
        )
    if differing:
        raise ValueError(
            f'{output} was begun with other settings: {"; ".join(differing)}. '
            'Prepare into another folder, or remove this one.'
        )


def run(
    manifest: Manifest,
    settings: Settings,
    output: str,
    name: str,
    num_workers: int,
    num_shards: int | None = None,
    shard_mb: float = SHARD_MB,
) -> Summary:
    """Writes what is missing of the dataset and returns what it holds."""
    begin = time.monotonic()
    place = choose_place(output)
    folder = place.folder
    with workers.lock_folder(folder / shards.STATE_FOLDER / 'lock', output) as lock:
        place.begin()
        plan = read_plan(folder)
        if plan is None:
            if others := place.others():
                place.leave()
                raise ValueError(f'output must be a new or empty folder; {output} holds {others[:3]}.')
            plan = make_plan(manifest, settings, name, num_shards, shard_mb, num_workers)
            shards.write_text(folder / shards.STATE_FOLDER / PLAN_FILE, json.dumps(plan._asdict(), indent=1) + '\n')
            place.plan_written()
        else:
            check_same_job(output, plan, manifest, settings, name, num_shards)
        tasks = _tasks(folder, plan, manifest, settings)
        finished = _read_done(place, tasks)
        todo = [task for task in tasks if finished[task.file] is None]
        if todo:
            # Not finished, whatever an earlier run said: a shard was damaged or removed since.
            place.withdraw()
        total = sum(len(task.rows) for task in tasks)
        already = total - sum(len(task.rows) for task in todo)
        written = _write(todo, num_workers, total, already, lock.fileno(), place)
        finished |= _read_done(place, todo)
        done = []
        for task in tasks:
            shard = finished[task.file]
            if shard is None:
                raise ValueError(
                    f'{task.file} in {output} was changed while it was written; run the same command again.'
                )
            done.append((task, shard))
        info, failures = _finish(folder, plan, manifest, settings, done)
        place.finish()
    return Summary(info, failures, total + len(manifest.missing), time.monotonic() - begin, written)


def _read_done(place: OnDisk, tasks: Sequence[shards.ShardTask]) -> dict[str, shards.ShardDone | None]:
    files = [task.file for task in tasks]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # A store takes its time for each answer.
        return dict(zip(files, pool.map(place.read_done, files), strict=True))


def _tasks(folder: Path, plan: Plan, manifest: Manifest, settings: Settings) -> list[shards.ShardTask]:
    tasks = []
    for i, (split, rows) in enumerate(manifest.splits.items()):
        count = plan.num_shards[split]
        for index, part in enumerate(shards.deal(len(rows), count)):
            file = shards.shard_name(plan.name, split, index, count)
            mine = [rows[j] for j in part]
            # Statistics are those of the first split: what a model may know of.
            tasks.append(shards.ShardTask(os.fspath(folder), file, split, mine, settings, measure=i == 0))
    return tasks


def _write(
    todo: Sequence[shards.ShardTask], num_workers: int, total: int, already: int, lock_fd: int, place: OnDisk
) -> int:
    counts: Counter[str] = Counter()
    if not todo:
        return 0
    with progress_lib.progress(total, what='preparing', unit='clips', initial=already) as bar:

        def on_row(task: shards.ShardTask, row: shards.RowDone) -> None:
            counts['written' if row.num_bytes else 'skipped'] += 1
            if counts['skipped']:
                bar.note(skipped=counts['skipped'])
            bar.update()

        workers.run_tasks(todo, num_workers, on_row, lock_fd, on_task=lambda task: place.shard_written(task.file))
        place.wait()
    return counts['written']


def _finish(
    folder: Path,
    plan: Plan,
    manifest: Manifest,
    settings: Settings,
    done: Sequence[tuple[shards.ShardTask, shards.ShardDone]],
) -> tuple[schema.DatasetInfo, list[Failure]]:
    failures = [*manifest.missing, *(failure for _, shard in done for failure in shard.failures)]
    shards.write_text(folder / 'failures.csv', failures_csv(failures))
    splits: dict[str, tuple[schema.ShardInfo, ...]] = {}
    sums, modalities = Sums(), set()
    for task, shard in done:
        splits[task.split] = (*splits.get(task.split, ()), shard.info)
        modalities |= set(shard.modalities)
        if task.measure:
            sums.add(shard.sums)
    if not sum(shard.info.num_records for _, shard in done):
        reasons = Counter(failure.reason for failure in failures)
        raise ValueError(
            f'not one clip could be prepared: {dict(reasons.most_common())}. {folder / "failures.csv"} has every file.'
        )
    info = schema.DatasetInfo(
        name=plan.name,
        modalities=tuple(sorted(modalities)),
        media=settings.media,
        splits=splits,
        labels=manifest.labels,
        statistics=sums.statistics('image' if 'image' in settings.modalities else 'video'),
        longest_seconds=max(shard.longest_seconds for _, shard in done),
    )
    shards.write_tfds_metadata(folder, info)
    shards.write_text(folder / schema.INFO_FILE, info.to_json())
    return info, failures


def free_bytes(output: str) -> int | None:
    """Room for the result; a store is taken to have as much as it takes."""
    if '://' in output:
        return None
    path = Path(output).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
