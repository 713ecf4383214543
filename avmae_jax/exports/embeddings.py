"""Features of media files, one row a clip, in a Parquet file.

    path, start, end       of the clip; seconds, end empty where the clip is the rest of its file
    video, audio, image    float32 lists: the mean over the modality's tokens and over moments, no other modality given;
                           empty where the clip lacks the modality

They are those that `evaluate` scores, so that clips of different modalities can be held against each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from avmae_jax import whole
from avmae_jax.data import batches, files
from avmae_jax.data.mixing import Mixture
from avmae_jax.data.prepare import lists
from avmae_jax.data.prepare.clips import ClipRow, Failure, printable
from avmae_jax.evaluation import passes
from avmae_jax.exports.trained import Trained, published
from avmae_jax.progress import progress
from avmae_jax.structs import Modality

CLIPS_AT_ONCE = 128  # Read before they are embedded: what lies in the temporary folder at a time.


def read_rows(media: str) -> list[ClipRow]:
    """The clips of a folder, or of a list as `prepare` takes it, in its order; files that are not there included."""
    chosen = lists.detect_format(media)
    entries = list(lists.FORMATS[chosen].read(lists.Source(media, '')))
    if not any(entry.path for entry in entries):
        raise ValueError(f'{media} names no file that is there.')
    # As a failure tells: what was looked for, and where.
    paths = [entry.path or os.path.join(os.path.dirname(media), entry.wanted) for entry in entries]
    return [
        ClipRow(f'{i} {printable(path)}', path, e.start or 0.0, e.end, {}, e.trimmed)
        for i, (path, e) in enumerate(zip(paths, entries, strict=True))
    ]


def write_embeddings(
    path: str | os.PathLike[str], trained: Trained, rows: Sequence[ClipRow], *, batch_size: int, num_clips: int
) -> list[Failure]:
    """Writes a row for each clip that can be read, in their order; the failures are of the others, and of parts."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("--embeddings needs pyarrow: pip install 'avmae_jax[export]'.") from error
    path = os.fspath(path)
    if os.path.exists(path):
        raise ValueError(f'{path} is there already: remove it, or write to another --output.')
    columns = {'path': pyarrow.string(), 'start': pyarrow.float64(), 'end': pyarrow.float64()}
    columns |= {m: pyarrow.list_(pyarrow.float32()) for m in trained.modalities}
    # Who reads the file finds what made it.
    schema = pyarrow.schema(columns, metadata={'avmae_jax': repr(published(trained.about).get('checkpoint', ''))})
    failures: list[Failure] = []
    with whole.new_file(os.path.abspath(path)) as made, parquet.ParquetWriter(os.fspath(made), schema) as writer:
        for table in embed_rows(trained, rows, failures, batch_size=batch_size, num_clips=num_clips):
            writer.write_table(pyarrow.table(table, schema=schema))
    return failures


def embed_rows(
    trained: Trained, rows: Sequence[ClipRow], failures: list[Failure], *, batch_size: int, num_clips: int
) -> Iterator[dict[str, list[Any]]]:
    """Tables of the columns of the file, some clips at a time; `failures` gets what could not be read."""
    features = passes.make_feature_step(trained.model, trained.preprocess)

    @jax.jit
    def step(params: Any, batch: Any) -> dict[str, Any]:
        found = features(params, batch)
        return {'alone': found['alone'], 'present': found['present'], 'record': batch.record, 'weight': batch.weight}

    params = jax.device_put(trained.params)
    unit = num_clips * trained.view.eval_crops
    batch_size = -(-batch_size // unit) * unit
    with progress(len(rows), what='embedding', unit='clips') as bar:
        for start in range(0, len(rows), CLIPS_AT_ONCE):
            part = rows[start : start + CLIPS_AT_ONCE]
            with files.open_clips(part, trained.info, trained.modalities, on_clip=bar.update) as source:
                failures += source.failures
                bar.note(failed=sum(failure.outcome == 'skipped' for failure in failures))
                if not len(source):
                    continue
                with batches.eval_stream(Mixture([source]), trained.view, batch_size, num_clips) as stream:
                    found = [jax.tree.map(np.asarray, step(params, batch)) for batch in stream]
                yield _table(source.rows, found, trained.modalities)


def _table(
    rows: Sequence[ClipRow], found: Sequence[Mapping[str, Any]], modalities: Sequence[Modality]
) -> dict[str, list[Any]]:
    """The columns for these clips: the mean over the rows of each."""
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    counted = whole['weight'] > 0
    table: dict[str, list[Any]] = {
        'path': [printable(row.path) for row in rows],
        'start': [row.start for row in rows],
        'end': [row.end for row in rows],
    }
    for m in modalities:
        table[m] = []
        for i in range(len(rows)):
            mine = counted & (whole['record'] == i)
            there = mine.any() and whole['present'][m][mine].all()
            table[m].append(whole['alone'][m][mine].mean(axis=0) if there else None)
    return table
