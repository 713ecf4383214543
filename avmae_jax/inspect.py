"""Says what a dataset folder, a shard, a run, a checkpoint or a config holds, and whether it is undamaged.

    python -m avmae_jax.inspect DIR_OR_FILE [--verify] [--sheet=FILE.png]

Prints what is there, checks digests, and draws clips (frames over spectrogram) into a PNG. Without --verify or
--noverify, datasets of up to 2 GB are read whole, and of larger ones sizes, indexes and framing are checked.
The exit code is 1 when anything is damaged, and every fault names its file; 2 when the path is nothing known, or
something else was wrong with the command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath

from avmae_jax import settings
from avmae_jax.data import inspection, schema
from avmae_jax.data.inspection import Inspection
from avmae_jax.data.video import decode_frames
from avmae_jax.evaluation import drawing
from avmae_jax.progress import progress
from avmae_jax.structs import Clip
from avmae_jax.training import goodput

_VERIFY = flags.DEFINE_bool(
    'verify', None, 'Read every byte (--verify) or none (--noverify); by default as size allows.'
)
_SHEET = flags.DEFINE_string('sheet', 'contact_sheet.png', 'Where to draw clips of a dataset or shard; empty: nowhere.')
_CLIPS = flags.DEFINE_integer('num_clips', 12, 'Clips on the sheet.')
_SPLIT = flags.DEFINE_string('split', '', 'Split to draw; by default the first.')
_MEL_BINS = flags.DEFINE_integer('mel_bins', 128, 'Of the log-mel in SequenceExamples, which do not say.')

READ_ALL_BYTES = 2e9
FRAMES_PER_CLIP = 6
TILE_HEIGHT = 72


# -- Kinds of things: each function takes a path and prints nothing --


def inspect_folder_of_records(path: epath.Path) -> Inspection:
    """TFRecord files that no dataset.json describes, such as SequenceExamples of somebody else."""
    lines, faults = [], []
    files = record_files(path)
    with progress(None, what='reading', unit='records') as bar:
        for file in files:
            found = inspection.inspect_shard(file, _MEL_BINS.value, bar.update)
            lines += [
                (file.name, inspection.format_bytes(file.stat().length)),
                *(('', f'{a} {b}') for a, b in found.lines),
            ]
            faults += found.faults
    if (path / '.prepare').exists():
        faults.append(
            f'{path} has no {schema.INFO_FILE}: its preparation has not finished; run the same command again.'
        )
    return Inspection(lines, faults)


def inspect_dataset(path: epath.Path) -> Inspection:
    info = schema.read_info(path)
    total = sum(shard.num_bytes for shards in info.splits.values() for shard in shards)
    check = 'full' if _VERIFY.value or (_VERIFY.value is None and total <= READ_ALL_BYTES) else 'framing'
    if _VERIFY.value is False:
        check = 'none'
    num_records = sum(info.num_records(split) for split in info.splits)
    with progress(num_records, what='checking', unit='records') as bar:
        found = inspection.inspect_dataset(path, check, bar.update)
    said = {
        'none': 'nothing',
        'framing': 'sizes, indexes and framing; --verify reads every byte',
        'full': f'sizes, indexes, sha256 of every shard, every record ({inspection.format_bytes(total)})',
    }[check]
    head = ('dataset', f'{info.name}, format {info.format_version}, digest {info.digest()[:16]}')
    return Inspection([head, *found.lines, ('checked', said)], found.faults)


def inspect_shard(path: epath.Path) -> Inspection:
    with progress(None, what='reading', unit='records') as bar:
        return inspection.inspect_shard(path, _MEL_BINS.value, bar.update)


def inspect_checkpoint(path: epath.Path) -> Inspection:
    """One step's folder. Needs orbax, and with it jax, which datasets do without."""
    import orbax.checkpoint as ocp

    from avmae_jax.checkpoints import manager

    fault = None if _VERIFY.value is False else manager.find_fault(path)
    faults = [] if fault is None else [f'{path}: {fault}.']
    lines = [('step', path.name)]
    digests = path / manager.DIGESTS_FILE
    if digests.exists() and not faults:
        sizes = [size for size, _ in json.loads(digests.read_text())['files'].values()]
        lines.append(('size', f'{inspection.format_bytes(sum(sizes))} in {len(sizes)} files'))
    meta = path / manager.META / 'metadata'
    if meta.exists():
        lines += [(f'meta {name}', shorten(json.dumps(value))) for name, value in json.loads(meta.read_text()).items()]
    metrics = path / 'metrics' / 'metrics'
    if metrics.exists():
        lines.append(('metric', metrics.read_text()))
    for item in sorted(child.name for child in path.iterdir() if (child / '_METADATA').exists()):
        try:
            tree = ocp.PyTreeCheckpointer().metadata(os.fspath(path / item)).item_metadata.tree
        except Exception as error:  # Whatever orbax makes of damaged files; the digests have named them already.
            faults.append(f'{path / item}: its arrays cannot be listed ({type(error).__name__}: {error}).')
            continue
        arrays = {name: array for name, array in flatten(tree) if hasattr(array, 'shape')}
        count = sum(int(np.prod(array.shape)) for array in arrays.values())
        lines.append((item, f'{count:,} values in {len(arrays)} arrays'))
        if item == 'params':
            lines += [('', f'{name}  {array.dtype} {tuple(array.shape)}') for name, array in arrays.items()]
    return Inspection(lines, faults)


def inspect_run(path: epath.Path) -> Inspection:
    """A work folder: its config, how far it came, its checkpoints."""
    lines, faults = [], []
    if (path / 'config.json').exists():
        found = inspect_config(path / 'config.json')
        lines += found.lines
        faults += found.faults
    if (path / 'metrics.jsonl').exists():
        rows = [line for line in (path / 'metrics.jsonl').read_text().splitlines() if line.endswith('}')]
        if rows:
            last = json.loads(rows[-1])
            lines.append(('scalars', f'{len(rows):,} lines, the last of step {last.get("step"):,}'))
            lines.append(('', ', '.join(f'{name} {value:.4g}' for name, value in last.items() if name != 'step')))
    spent = goodput.summarise(goodput.read(path))
    if spent is not None:
        lines.append(('goodput', str(spent)))
    folder = path / 'checkpoints' if (path / 'checkpoints').exists() else path
    steps = sorted((child for child in folder.iterdir() if child.name.isdigit()), key=lambda child: int(child.name))
    for i, step in enumerate(steps):
        found = inspect_checkpoint(step)
        lines += [('checkpoint', step.name)]
        shown = found.lines[1:] if i == len(steps) - 1 else found.lines[1:2]  # All of the newest.
        lines += [('', f'{name} {text}'.strip()) for name, text in shown]
        faults += found.faults
    if not steps:
        lines.append(('checkpoints', 'none'))
    return Inspection(lines, faults)


def inspect_config(path: epath.Path) -> Inspection:
    """A config in Python (with its arguments, as FILE.py:size=B), or the config.json of a run."""
    name = os.fspath(path)
    if name.endswith('.json'):
        try:
            tree = json.loads(epath.Path(name).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f'{path} cannot be read as a config: {type(error).__name__}: {error}') from error
    else:
        tree = settings.read_config(name)
        name = name.partition(':')[0]
    return Inspection([('', f'{name} = {value}') for name, value in flatten(tree, separator='.')], [])


def flatten(tree: dict | list, prefix: str = '', separator: str = '/') -> list[tuple[str, Any]]:
    """(path, leaf) of nested dicts and lists."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if value and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict | list))):
            rows += flatten(value, f'{prefix}{name}{separator}', separator)
        else:
            rows.append((f'{prefix}{name}', value))
    return rows


def shorten(text: str, length: int = 100) -> str:
    return text if len(text) <= length else f'{text[: length - 3]}...'


# -- The picture --


def record_files(folder: epath.Path) -> list[epath.Path]:
    return sorted(file for file in folder.glob('*tfrecord*') if not file.name.endswith('.index'))


def draw_clip(clip: Clip, info: schema.DatasetInfo | None, side: int = TILE_HEIGHT) -> drawing.Picture:
    """Frames from all over a clip, and its sound below them on the same axis of time."""
    width = FRAMES_PER_CLIP * (side + 2) - 2
    title = clip.id
    for head, indices in clip.labels.items():
        names = info.labels[head].names if info is not None and head in info.labels else ()
        title += '  ' + ' '.join(names[i] if 0 <= i < len(names) else str(i) for i in indices)
    parts = [drawing.caption(title, width)]
    if clip.num_frames:
        chosen = np.linspace(0, clip.num_frames - 1, min(FRAMES_PER_CLIP, clip.num_frames)).round().astype(int).tolist()
        try:
            frames = [frame.copy() for _, frame in decode_frames(clip, chosen, short_side=side)]
            tiles = [fit(frame, side) for frame in frames]
            parts.append(drawing.beside(tiles))
        except ValueError as error:
            parts.append(drawing.caption(f'the picture does not decode: {error}', width))
    spectrogram = clip.spectrogram
    if spectrogram is None and clip.waveform is not None:
        spectrogram = drawing.look_at_sound(clip.waveform, clip.sample_rate)
    if spectrogram is not None:
        picture = drawing.colour_spectrogram(spectrogram, drawing.brightness_limits(spectrogram))
        parts.append(drawing.resize(picture, height=side, width=width))
    else:
        parts.append(drawing.caption('no sound', width))
    return drawing.below(parts)


def fit(frame: drawing.Picture, side: int) -> drawing.Picture:
    """The whole frame within a square, on grey."""
    scale = side / max(frame.shape[:2])
    height, width = (max(1, round(n * scale)) for n in frame.shape[:2])
    tile = drawing.blank(side, side, (200, 200, 205))
    top, left = (side - height) // 2, (side - width) // 2
    tile[top : top + height, left : left + width] = drawing.resize(frame, height=height, width=width)
    return tile


def draw_sheet(files: Sequence[epath.Path], info: schema.DatasetInfo | None) -> drawing.Picture | None:
    clips = inspection.sample_clips(files, _CLIPS.value, _MEL_BINS.value)
    if not clips:
        return None
    tiles = [draw_clip(clip, info) for clip in clips]
    columns = 2 if len(tiles) > 3 else 1
    rows = [drawing.beside(tiles[i : i + columns], gap=12) for i in range(0, len(tiles), columns)]
    return np.pad(drawing.below(rows, gap=12), ((8, 8), (8, 8), (0, 0)), constant_values=255)


# -- Which kind of thing a path is --


def find_kind(path: epath.Path) -> tuple[str, Callable[[epath.Path], Inspection]]:
    """(what it is, in words, and the function that looks into it); ValueError when it is nothing we know."""
    if ':' in path.name and path.name.partition(':')[0].endswith('.py'):
        return 'config', inspect_config
    if not path.exists():
        raise ValueError(f'{path} does not exist.')
    if path.is_dir():
        if (path / schema.INFO_FILE).exists():
            return 'dataset', inspect_dataset
        if path.name.isdigit():
            return 'checkpoint', inspect_checkpoint
        if any((path / name).exists() for name in ('checkpoints', 'config.json', 'metrics.jsonl')):
            return 'run', inspect_run
        if any(child.name.isdigit() for child in path.iterdir()):
            return 'run', inspect_run
        if record_files(path) or (path / '.prepare').exists():
            return 'TFRecord files', inspect_folder_of_records
        raise ValueError(f'{path} holds neither a dataset, nor TFRecord files, nor a run, nor a checkpoint.')
    if path.name == schema.INFO_FILE:
        return find_kind(path.parent)
    if path.suffix in ('.json', '.py'):
        return 'config', inspect_config
    if path.suffix == '.index':
        raise ValueError(f'{path} is an index; give the TFRecord file beside it.')
    if 'tfrecord' in path.name:
        return 'TFRecord file', inspect_shard
    raise ValueError(
        f'{path} is of no kind that is known here: a dataset folder, a TFRecord file (its name holds "tfrecord"), '
        'a run or checkpoint folder, or a config (.py, .json).'
    )


def main(argv: Sequence[str]) -> None:
    try:
        inspect(argv[1:])
    except (ValueError, OSError, ImportError) as error:  # ImportError: gs:// without its packages.
        print(f'inspect: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def inspect(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise ValueError(f'give one folder or file to inspect; got {len(arguments)}.')
    if _CLIPS.value < 0:
        raise ValueError(f'num_clips must be 0 or more; got {_CLIPS.value}.')
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # Somebody may be training on the device.
    logging.set_verbosity(logging.ERROR)
    path = epath.Path(arguments[0])
    if path.name == schema.INFO_FILE:
        path = path.parent
    kind, look = find_kind(path)
    found = look(path)
    print(f'{path}: {kind}')
    width = max((len(name) for name, _ in found.lines), default=0)
    for name, text in found.lines:
        print(f'  {name:<{width}}  {text}'.rstrip())
    if _SHEET.value and kind in ('dataset', 'TFRecord files', 'TFRecord file'):
        save_sheet(path, kind)
    for fault in found.faults:
        print(f'DAMAGED  {fault}', file=sys.stderr)
    if found.faults:
        sys.exit(f'inspect: {len(found.faults)} faults in {path}.')
    print('No damage was found.' if _VERIFY.value is not False else 'Nothing was checked.')


def save_sheet(path: epath.Path, kind: str) -> None:
    info = None
    if kind == 'dataset':
        info = schema.read_info(path)
        split = _SPLIT.value or next(iter(info.splits))
        if split not in info.splits:
            raise ValueError(f'--split={split}: there are {", ".join(info.splits)}.')
        files = [path / shard.file for shard in info.splits[split] if (path / shard.file).exists()]
    else:
        files = record_files(path) if path.is_dir() else [path]
        beside = files[0].parent if files else path
        info = schema.read_info(beside) if (beside / schema.INFO_FILE).exists() else None
    sheet = draw_sheet(files, info)
    if sheet is None:
        print('There is no clip to draw.')
        return
    drawing.write_png(_SHEET.value, sheet)
    print(f'Clips are drawn in {_SHEET.value}.')


if __name__ == '__main__':
    app.run(main, flags_parser=settings.flags_parser('inspect'))
