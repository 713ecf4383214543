"""Writes made-up clips to try everything with: mp4 files of bodies that move and sound, and the CSV that lists them.

    python -m avmae_jax.make_clips --output=DIR --num_clips=400
    python -m avmae_jax.prepare --input=DIR/clips.csv --output=...

The same seed gives the same clips. The label says what a clip shows: its material and its motion.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags

from avmae_jax import settings
from avmae_jax.data.generate import LABELS, write_clips
from avmae_jax.progress import progress

_OUTPUT = flags.DEFINE_string('output', None, 'Folder for the clips and clips.csv.', required=True)
_NUM_CLIPS = flags.DEFINE_integer('num_clips', 450, f'Of {len(LABELS)} classes in turn; one in 5 is for testing.')
_SEED = flags.DEFINE_integer('seed', 0, 'Other clips for other seeds.')
_SECONDS = flags.DEFINE_float('seconds', 2.0, 'Length of a clip.')
_SIZE = flags.DEFINE_integer('size', 112, 'Side of the square picture in pixels.')
_FPS = flags.DEFINE_float('fps', 25.0, 'Frames a second.')
_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes; one a core if not given.')


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        refuse(f'not understood: {" ".join(argv[1:])}; flags are written --name=value.')
    start = time.monotonic()
    with progress(_NUM_CLIPS.value, what='making', unit='clips') as bar:
        try:
            table = write_clips(
                _OUTPUT.value,
                _NUM_CLIPS.value,
                _SEED.value,
                seconds=_SECONDS.value,
                size=_SIZE.value,
                fps=_FPS.value,
                num_processes=_PROCESSES.value,
                progress=lambda done: bar.update(),
            )
        except (ValueError, OSError) as error:
            refuse(error)
        except KeyboardInterrupt:
            refuse('interrupted; what was made so far is of no use without clips.csv.', code=130)
    print(f'Wrote {_NUM_CLIPS.value} clips in {time.monotonic() - start:.1f} s and listed them in {table}.')


def refuse(error: object, code: int = 2) -> NoReturn:
    print(f'make_clips: {error}', file=sys.stderr)
    sys.exit(code)


if __name__ == '__main__':
    app.run(main, flags_parser=settings.flags_parser('make_clips'))
