"""VERB: freezes a trained model into something that others load.

    python -m avmae_jax.export --checkpoint=RUN --format=safetensors --output=DIR
    python -m avmae_jax.export --checkpoint=RUN/checkpoints/1000 --format=orbax --dtype=bfloat16 --output=DIR

`--format` is one of

  safetensors   what `avmae_jax.load_pretrained(DIR)` reads: parameters, model, labels, preprocessing
  orbax         a run of the parameters alone, for `config.start.path=DIR` and for orbax
  jax_export    programs with the parameters in them (StableHLO), which run without this package
  scenic        a checkpoint for Scenic's av_mae or mbt, and what its config says of the model

Each comes with a model card, README.md, whose TODOs (licences, limits) are yours, and with digests.json. DIR appears
whole or not at all.

The parameters are the moving average where the run kept one (`--noaveraged`: the last ones), or with `--average_last=N`
the mean over the last N checkpoints.

Exit codes: 0 done; 2 a setting is wrong, the model has no counterpart in the format, or a file cannot be read or
written; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging
from etils import epath

from avmae_jax import pretrained, settings
from avmae_jax.exports import card, folder, native, orbax, program, scenic
from avmae_jax.exports.trained import DTYPES, Trained, named_arrays
from avmae_jax.weights import safetensors

EXIT_SETTINGS, EXIT_INTERRUPTED = 2, 130

# Writes what a format consists of into a folder; the card and the digests come from here.
FORMATS: dict[str, Callable[[epath.Path, Trained, str], None]] = {
    'safetensors': native.write,
    'orbax': orbax.write,
    'jax_export': program.write,
    'scenic': scenic.write,
}

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, for its newest checkpoint; or RUN/checkpoints/STEP.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write; must not be there yet.')
_FORMAT = flags.DEFINE_string('format', 'safetensors', f'One of {", ".join(FORMATS)}.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', f'Of the parameters: {" or ".join(DTYPES)}.')
_AVERAGED = flags.DEFINE_bool('averaged', True, 'The moving average of the parameters, where the run kept one.')
_AVERAGE_LAST = flags.DEFINE_integer('average_last', 1, 'The mean over so many checkpoints.', lower_bound=1)


def export(output: epath.PathLike, trained: Trained, format_name: str, dtype: str) -> None:
    """Writes a whole folder, or nothing."""
    with folder.new_folder(output) as made:
        FORMATS[format_name](made, trained, dtype)
        card.write_card(made, trained, format_name, dtype)


def run() -> None:
    for name, flag in (('checkpoint', _CHECKPOINT), ('output', _OUTPUT)):
        if not flag.value:
            raise ValueError(f'--{name} is needed: python -m avmae_jax.export --checkpoint=RUN --output=DIR')
    if _FORMAT.value not in FORMATS:
        raise ValueError(f'--format={_FORMAT.value} is none of {", ".join(FORMATS)}.')
    if _DTYPE.value not in DTYPES:
        raise ValueError(f'--dtype={_DTYPE.value} is none of {", ".join(DTYPES)}.')
    trained = pretrained.read_run(_CHECKPOINT.value, averaged=_AVERAGED.value, average_last=_AVERAGE_LAST.value)
    safetensors.check_finite(named_arrays(trained.params))
    export(_OUTPUT.value, trained, _FORMAT.value, _DTYPE.value)
    print(f'Written to {_OUTPUT.value}: step {trained.about["step"]:,} of {_CHECKPOINT.value} as {_FORMAT.value}.')


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f'What is {" ".join(argv[1:])}? Flags are written --name=value.')
        run()
    except (ValueError, OSError) as error:
        logging.debug('The setting was found wrong here:', exc_info=True)
        print(f'export: {error}', file=sys.stderr, flush=True)
        sys.exit(EXIT_SETTINGS)
    except KeyboardInterrupt:
        print('export: interrupted; nothing was written.', file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == '__main__':
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=settings.flags_parser('export'))
