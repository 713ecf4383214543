"""VERB: media files and a list of clips -> shards that a training job can read.

    python -m avmae_jax.prepare --input=clips.csv --output=DIR
    python -m avmae_jax.prepare --input=eval_segments.csv --media_dir=downloaded --output=DIR --dry_run

`docs/data.md` has the formats, every option, what becomes of dirty media, and recipes. Run the same command
again after an interruption: only what is missing is done.

Exit codes: 0 done; 2 a setting is wrong, or a file cannot be read or written; 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

from absl import app, flags

from avmae_jax import progress as progress_lib
from avmae_jax import settings as settings_lib
from avmae_jax.data.prepare import clips, job, lists, manifest
from avmae_jax.data.schema import CODECS, DatasetInfo

_INPUT = flags.DEFINE_multi_string(
    'input', [], 'A list of clips or a folder of media, as PATH or SPLIT=PATH; give the flag several times for several.'
)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Folder to write, or gs://...: new, empty, or begun by the same command with the same settings.'
)
_FORMAT = flags.DEFINE_enum('format', 'auto', ['auto', *lists.FORMATS], 'Format of the list; auto looks at it.')
_MEDIA_DIR = flags.DEFINE_string('media_dir', '', 'Where the files are; the folder of the list if not given.')
_NAME = flags.DEFINE_string('name', '', 'Name of the dataset; the name of the output folder if not given.')
_MODALITIES = flags.DEFINE_enum(
    'modalities', 'auto', ['auto', 'video+audio', 'video', 'audio', 'image'], 'What to store; auto goes by the files.'
)
_LABEL_NAMES = flags.DEFINE_multi_string(
    'label_names', [], 'File of class names, as PATH or HEAD=PATH; what is published beside a list is found by itself.'
)
_EVAL_FRACTION = flags.DEFINE_float('eval_fraction', 0.0, 'Share of the files without a split that becomes "test".')
_CODEC = flags.DEFINE_enum(
    'codec', 'jpeg', CODECS, 'jpeg for local disks, h264 (a quarter the size) for object stores.'
)
_FPS = flags.DEFINE_float('fps', 12.5, 'Frames a second to store.')
_SHORT_SIDE = flags.DEFINE_integer('short_side', 256, 'Pixels of the short side at most; 0 keeps the size.')
_JPEG_QUALITY = flags.DEFINE_integer('jpeg_quality', 85, 'Quality of the frames, 1 to 100.')
_GOP = flags.DEFINE_integer('gop', 12, 'h264: frames from one key frame to the next.')
_CLIP_SECONDS = flags.DEFINE_float('clip_seconds', None, 'Cut what is longer into clips of this length.')
_MAX_SECONDS = flags.DEFINE_float('max_seconds', 600.0, 'The most that one clip may hold.')
_OUTCOMES = {
    name: flags.DEFINE_enum(name, getattr(clips.Settings, name), outcomes, help)
    for (name, outcomes), help in zip(
        clips.OUTCOMES.items(),
        (
            'Clips without a picture: skip, or fill (stored, flagged as absent).',
            'Clips without sound: skip, or fill.',
            'Clips whose sound track is silent: keep, skip, or fill as if there were none.',
            'Clips of which parts do not decode: keep what does, or skip.',
            'Clips whose file ends early: keep what there is, or skip.',
        ),
        strict=True,
    )
}
_TIMEOUT = flags.DEFINE_float('timeout_seconds', 120.0, 'What one clip may take before its process is killed.')
_MEMORY = flags.DEFINE_float('memory_gb', 8.0, 'What one process may take.')
_NUM_WORKERS = flags.DEFINE_integer('num_workers', 0, 'Processes; 0: one a core. Does not change the result.')
_NUM_SHARDS = flags.DEFINE_integer('num_shards', None, 'Shards of each split; else by shard_mb.')
_SHARD_MB = flags.DEFINE_float('shard_mb', job.SHARD_MB, 'Size to aim at for a shard.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order of clips.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Say what would be done, how large it will be and how long it takes.')


def default_name(output: str) -> str:
    """A name that tensorflow_datasets accepts, from the output folder's."""
    word = re.sub(r'[^a-z0-9_]+', '_', Path(output.split('://')[-1]).absolute().name.lower()).strip('_') or 'clips'
    return word if word[0].isalpha() else f'data_{word}'


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def megabytes(num_bytes: float) -> str:
    return f'{num_bytes / 1e9:,.1f} GB' if num_bytes >= 1e9 else f'{num_bytes / 1e6:,.1f} MB'


def describe_manifest(found: manifest.Manifest) -> str:
    missing = Counter(failure.split for failure in found.missing)
    lines = []
    for split in [*found.splits, *(split for split in missing if split not in found.splits)]:
        num_found = len(found.splits.get(split, ()))
        lost = f', {missing[split]:,} of {num_found + missing[split]:,} missing' if missing[split] else ''
        lines.append(f'  {split}: {num_found:,} clips found{lost}')
    kinds = ', '.join(f'{count:,} {kind}' for kind, count in found.kinds.items())
    lines.append(f'  files: {kinds}')
    for head, labels in found.labels.items():
        lines.append(f'  labels of {head}: {len(labels.names)} classes' + (', several a clip' if labels.multi else ''))
    return '\n'.join(lines)


def describe_sample(sample: job.Sample, found: manifest.Manifest, num_workers: int, output: str) -> str:
    total = sum(len(rows) for rows in found.splits.values())
    size = sample.num_bytes / sample.num_clips * total
    seconds = sample.seconds / sample.num_clips * total
    skipped = sum(failure.outcome == 'skipped' for failure in sample.failures)
    lines = [
        f'  about {megabytes(size)} for {total:,} clips ({megabytes(sample.num_bytes / sample.num_clips)} each), '
        f'{progress_lib.format_seconds(seconds)} with {num_workers} processes '
        f'(measured on {sample.num_clips} clips, {skipped} of them skipped)'
    ]
    free = job.free_bytes(output)
    if free is not None and size > free:
        lines.append(f'  TOO LARGE: {megabytes(free)} are free at {output}')
    return '\n'.join(lines)


def describe_summary(summary: job.Summary, output: str) -> str:
    info = summary.info
    lines = [f'{info.name} in {output}: {" and ".join(info.modalities)}']
    for split, shards in info.splits.items():
        size = sum(shard.num_bytes for shard in shards)
        lines.append(f'  {split}: {info.num_records(split):,} clips in {len(shards)} shards, {megabytes(size)}')
    reasons = Counter((failure.reason, failure.outcome) for failure in summary.failures)
    for (reason, outcome), count in reasons.most_common():
        lines.append(f'  {count:,} {outcome}: {reason} ({clips.REASONS[reason].meaning})')
    if summary.failures:
        lines.append(f'  every one of them: {os.path.join(output, "failures.csv")}')
    if summary.clips_written:
        rate = summary.clips_written / summary.seconds
        taken = progress_lib.format_seconds(summary.seconds)
        lines.append(f'  {summary.clips_written:,} clips written in {taken}, {rate:.1f} clips/s')
    else:
        lines.append('  nothing was missing')
    lines.append(f'Look at it:  python -m avmae_jax.inspect {output}')
    lines.append(f'Train on it: {training_command(info, output)}')
    return '\n'.join(lines)


def training_command(info: DatasetInfo, output: str) -> str:
    tested = 'test'  # By the config.
    if 'image' in info.modalities:
        config, tested = 'configs/pretrain/imagenet.py', 'validation'
    elif len(info.modalities) == 1:
        config = f'configs/tiny.py:modalities={info.modalities[0]}'
    else:
        config = 'configs/tiny.py'
    splits = list(info.splits)
    train = ['train'] if 'train' in splits else splits[:-1] or splits  # Folds, say.
    others = [split for split in splits if split not in train]
    if train != ['train']:
        config += f' --config.data.split={"+".join(train)}'
    if not others:
        config += ' --config.evaluation.every_steps=0'
    elif tested not in others:
        config += f' --config.evaluation.split={others[-1]}'
    return f'python -m avmae_jax.train --config={config} --config.data.path={output} --workdir=runs/{info.name}'


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f'unknown argument {argv[1]!r}; flags are written --name=value.')
        _prepare()
    except (ValueError, OSError) as error:
        print(f'prepare: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('prepare: interrupted; the same command does what is missing.', file=sys.stderr)
        sys.exit(130)


def _prepare() -> None:
    if not _INPUT.value or not _OUTPUT.value:
        raise ValueError('--input and --output are needed: python -m avmae_jax.prepare --input=clips.csv --output=DIR')
    num_workers = _NUM_WORKERS.value or num_cores()
    if num_workers < 0:
        raise ValueError(f'num_workers must be 0 or more; got {num_workers}.')
    if _NUM_SHARDS.value is not None and _NUM_SHARDS.value < 1:
        raise ValueError(f'num_shards must be at least 1; got {_NUM_SHARDS.value}.')
    if not _SHARD_MB.value > 0:
        raise ValueError(f'shard_mb must be above 0; got {_SHARD_MB.value}.')
    found = manifest.read_manifest(
        _INPUT.value,
        format=_FORMAT.value,
        media_dir=_MEDIA_DIR.value,
        label_names=_label_names(_LABEL_NAMES.value),
        eval_fraction=_EVAL_FRACTION.value,
        seed=_SEED.value,
    )
    settings = clips.Settings(
        modalities=job.choose_modalities(found, _MODALITIES.value),
        codec=_CODEC.value,
        fps=_FPS.value,
        short_side=_SHORT_SIDE.value,
        jpeg_quality=_JPEG_QUALITY.value,
        gop=_GOP.value,
        clip_seconds=_CLIP_SECONDS.value,
        max_seconds=_MAX_SECONDS.value,
        timeout_seconds=_TIMEOUT.value,
        memory_gb=_MEMORY.value,
        seed=_SEED.value,
        **{name: flag.value for name, flag in _OUTCOMES.items()},
    )
    found = job.cut_rows(found, settings, num_workers)
    print(f'{" and ".join(settings.modalities)} of {", ".join(_INPUT.value)}\n{describe_manifest(found)}', flush=True)
    if _DRY_RUN.value:
        sample = job.take_sample(found, settings, num_workers)
        print(describe_sample(sample, found, num_workers, _OUTPUT.value))
        print('Nothing was written (--dry_run).')
        return
    name = _NAME.value or default_name(_OUTPUT.value)
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
        raise ValueError(f'name must be a word of lower-case letters, digits and _; got {name!r}.')
    summary = job.run(found, settings, _OUTPUT.value, name, num_workers, _NUM_SHARDS.value, _SHARD_MB.value)
    print(describe_summary(summary, _OUTPUT.value))


def _label_names(items: list[str]) -> dict[str, str]:
    found = {}
    for item in items:
        head, equals, path = item.partition('=')
        found[head if equals else 'label'] = path if equals else item
    return found


def _with_underscores(argv: list[str]) -> list[str]:
    """--dry-run is --dry_run."""
    flag = re.compile(r'^--?[a-zA-Z][\w-]*')
    return [flag.sub(lambda m: '--' + m[0].lstrip('-').replace('-', '_'), argument) for argument in argv]


def run_main() -> None:
    app.run(main, argv=_with_underscores(sys.argv), flags_parser=settings_lib.flags_parser('prepare'))


if __name__ == '__main__':
    run_main()
