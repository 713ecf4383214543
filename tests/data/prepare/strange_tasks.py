"""Tasks that do to their process what decoders do. Workers import this file by its name, so it is no test."""

import ctypes
import os
import time
from typing import NamedTuple

from avmae_jax.data.prepare.clips import ClipRow, Settings


class StrangeTask(NamedTuple):
    """Goes through rows whose ids say what to do; the result of a row is its id, or why it was lost."""

    rows: list[ClipRow]
    settings: Settings
    folder: str

    def work(self, done, report, starting):
        for row in self.rows[len(done) :]:
            starting()
            what, _, number = row.id.partition(' ')
            marker = os.path.join(self.folder, row.id)
            if what == 'hang':
                time.sleep(1000)
            elif what == 'segfault':
                ctypes.string_at(0)
            elif what == 'exit':
                os._exit(3)
            elif what == 'killed_once' and not os.path.exists(marker):
                with open(marker, 'w'):
                    pass
                os.kill(os.getpid(), 9)
            elif what == 'raise':
                raise RuntimeError('a bug of ours')
            elif what == 'disk_full':
                raise OSError(28, 'No space left on device', 'shard')
            elif what == 'hog':
                try:
                    bytearray(4 << 30)
                except MemoryError:
                    report('not enough memory')
                    continue
            report(row.id)

    def lost(self, row, reason, detail):
        return f'{reason}: {detail}'


def task(names, folder, **settings):
    rows = [ClipRow(name, '', 0.0, None, {}) for name in names]
    return StrangeTask(rows, Settings(**settings), str(folder))
