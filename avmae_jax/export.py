"""VERB: freezes a trained model into something that others load.

    python -m avmae_jax.export --checkpoint=RUN --format=safetensors --output=DIR
    python -m avmae_jax.export --checkpoint=RUN/checkpoints/1000 --format=orbax --dtype=bfloat16 --output=DIR

`--format` is one of

  safetensors   what `avmae_jax.load_pretrained(DIR)` reads: parameters, model, labels, preprocessing
  orbax         a run of the parameters alone, for `config.start.path=DIR` and for orbax
  jax_export    programs with the parameters in them (StableHLO), which run without this package
  torch         a PyTorch module in one file, with its parameters; needs nothing of us
  huggingface   one stream as VideoMAE, AST, ViTMAE or ViT of transformers, where the model has such a counterpart
  scenic        a checkpoint for Scenic's av_mae or mbt, and what its config says of the model

    python -m avmae_jax.export --checkpoint=RUN --embeddings=MEDIA --output=FILE.parquet

`MEDIA` is a folder of files, or a list as `prepare` takes it (path,start,end). FILE gets one row a clip: path, start,
end, and a vector for each modality. Clips that cannot be read are listed and left out. `--checkpoint` may be an export
here; of a run, the parameters are chosen as below. A flag that would do nothing is refused.

Each format comes with a model card, README.md, whose TODOs (licences, limits) are yours, and with digests.json. DIR
appears whole or not at all. `--modality=NAME` takes one of several modalities by itself (jax_export, huggingface).

The parameters are the moving average where the run kept one (`--noaveraged`: the last ones), or with `--average_last=N`
the mean over the last N checkpoints.

Exit codes: 0 done; 2 a setting is wrong, the model has no counterpart in the format, or a file cannot be read or
written; 65 some of the media cannot be read (the others are in FILE); 130 interrupted.
"""

from __future__ import annotations

import logging as python_logging
import sys
from collections.abc import Callable

from absl import app, flags, logging
from etils import epath

from avmae_jax import pretrained, settings, whole
from avmae_jax.data import files
from avmae_jax.data.batches import TooManyDamagedError
from avmae_jax.data.workers import LoaderError
from avmae_jax.exports import card, embeddings, folder, huggingface, native, orbax, program, pytorch, scenic
from avmae_jax.exports.trained import DTYPES, Trained, named_arrays
from avmae_jax.weights import safetensors

EXIT_SETTINGS, EXIT_DATA, EXIT_INTERRUPTED = 2, 65, 130

# Writes what a format consists of into a folder; the card and the digests come from here.
FORMATS: dict[str, Callable[[epath.Path, Trained, str], None]] = {
    'safetensors': native.write,
    'orbax': orbax.write,
    'jax_export': program.write,
    'scenic': scenic.write,
    'torch': pytorch.write,
    'huggingface': huggingface.write,
}

ALONE = ('jax_export', 'huggingface')  # Formats that can be of one modality of several.

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, for its newest checkpoint; or RUN/checkpoints/STEP.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write; must not be there yet.')
_FORMAT = flags.DEFINE_string('format', 'safetensors', f'One of {", ".join(FORMATS)}.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', f'Of the parameters: {" or ".join(DTYPES)}.')
_EMBEDDINGS = flags.DEFINE_string('embeddings', None, 'Media to embed: a folder, or a list with the header path.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Rows that are embedded at a time.', lower_bound=1)
_NUM_CLIPS = flags.DEFINE_integer('num_clips', 1, 'Moments of each clip that are averaged.', lower_bound=1)
_MODALITY = flags.DEFINE_string('modality', None, f'One of the modalities alone; for {" and ".join(ALONE)}.')
_AVERAGED = flags.DEFINE_bool('averaged', True, 'The moving average of the parameters, where the run kept one.')
_AVERAGE_LAST = flags.DEFINE_integer('average_last', 1, 'The mean over so many checkpoints.', lower_bound=1)


def export(output: epath.PathLike, trained: Trained, format_name: str, dtype: str) -> None:
    """Writes a whole folder, or nothing."""
    with whole.new_folder(output) as made:
        FORMATS[format_name](made, trained, dtype)
        card.write_card(made, trained, format_name, dtype)
        folder.write_digests(made)


def embed(output: str, media: str, trained: Trained) -> None:
    """Writes the Parquet file, and says what is not in it."""
    rows = embeddings.read_rows(media)
    failures = embeddings.write_embeddings(
        output, trained, rows, batch_size=_BATCH_SIZE.value, num_clips=_NUM_CLIPS.value
    )
    for failure in failures:
        print(f'export: {files.describe(failure)}', file=sys.stderr, flush=True)
    lost = len({failure.id for failure in failures if failure.outcome == 'skipped'})
    print(f'Written to {output}: {len(rows) - lost:,} of {len(rows):,} clips.')
    if lost:
        raise MediaError(f'{lost:,} of {len(rows):,} clips cannot be read, see above.')


def read_any(checkpoint: str) -> Trained:
    """What a run or an export holds; an export has one set of parameters, and none to choose."""
    if not native.is_export(epath.Path(checkpoint)):
        return read_chosen(checkpoint)
    settings.refuse_flags((_AVERAGED, _AVERAGE_LAST), f'chooses parameters of a run, and {checkpoint} is an export')
    return pretrained.load_pretrained(checkpoint).trained


def read_chosen(checkpoint: str) -> Trained:
    """The parameters of a run that the flags choose."""
    return pretrained.read_run(checkpoint, averaged=_AVERAGED.value, average_last=_AVERAGE_LAST.value)


class MediaError(Exception):
    """Some of the media to embed could not be read."""


def run() -> None:
    checkpoint, output = _CHECKPOINT.value, _OUTPUT.value
    if not checkpoint or not output:
        missing = 'output' if checkpoint else 'checkpoint'
        raise ValueError(f'--{missing} is needed: python -m avmae_jax.export --checkpoint=RUN --output=DIR')
    if _FORMAT.value not in FORMATS:
        raise ValueError(f'--format={_FORMAT.value} is none of {", ".join(FORMATS)}.')
    if _DTYPE.value not in DTYPES:
        raise ValueError(f'--dtype={_DTYPE.value} is none of {", ".join(DTYPES)}.')
    if _EMBEDDINGS.value:
        settings.refuse_flags((_FORMAT, _DTYPE, _MODALITY), 'is for exports, and says nothing of --embeddings')
        return embed(output, _EMBEDDINGS.value, read_any(checkpoint))
    settings.refuse_flags((_BATCH_SIZE, _NUM_CLIPS), 'is for --embeddings alone')
    trained = read_chosen(checkpoint)
    if _MODALITY.value:
        if _FORMAT.value not in ALONE:
            raise ValueError(f'--modality is for --format={" and ".join(ALONE)}; got {_FORMAT.value}.')
        trained = trained.alone(_MODALITY.value)
    safetensors.check_finite(named_arrays(trained.params))
    export(output, trained, _FORMAT.value, _DTYPE.value)
    print(f'Written to {output}: step {trained.about["step"]:,} of {checkpoint} as {_FORMAT.value}.')


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        run()
    except (ValueError, OSError) as error:
        logging.debug('The setting was found wrong here:', exc_info=True)
        print(f'export: {error}', file=sys.stderr, flush=True)
        sys.exit(EXIT_SETTINGS)
    except (MediaError, TooManyDamagedError, LoaderError) as error:
        print(f'export: {error}', file=sys.stderr, flush=True)
        sys.exit(EXIT_DATA)
    except KeyboardInterrupt:
        print('export: interrupted; nothing was written.', file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _not_chatty(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.ERROR or '/orbax/' not in record.pathname


if __name__ == '__main__':
    logging.get_absl_handler().addFilter(_not_chatty)  # Orbax tells its every move.
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=settings.flags_parser('export'))
