"""One job at a time in a workdir: two would overwrite each other's checkpoints, and both would look right.

The lock is the kernel's (flock) on a file in the workdir, so that it ends with the process that has it, however that
ends. It holds on local disks, and over NFS and other network file systems that pass locks on. Object stores
have none: there it is for whoever submits jobs to see to it that there is one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from typing import IO

from absl import logging
from etils import epath

FILE = 'lock'
# How long a network file system may keep the lock of a host that died; NFS servers wait for 90 s.
ELSEWHERE_SECONDS = 120.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class WorkdirLock:
    """The lock of a workdir, for process 0 of a job; kept until `close` or the end of the process.

    Attributes:
      holder: in words, who has it instead; None when it is ours.
    """

    def __init__(self, workdir: epath.PathLike):
        self.holder: str | None = None
        self._file: IO[str] | None = None
        if '://' in os.fspath(workdir):
            return
        path = epath.Path(workdir) / FILE
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, 'a+')  # Not 'w': what it says is the other's.
            self.holder = self._take()
            if self.holder is not None or _is_at(self._file, path):
                break
            self._file.close()  # A job that was refused took it away meanwhile: the next one would make another.
        if self.holder is None:
            self._file.seek(0)
            self._file.truncate()
            json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, self._file)
            self._file.flush()

    def _take(self) -> str | None:
        assert self._file is not None
        deadline, told = time.monotonic() + ELSEWHERE_SECONDS, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                who, host = self._read()
                if host in (None, socket.gethostname()) or time.monotonic() > deadline:
                    return who
                if not told:
                    told = True
                    logging.warning(
                        '%s is locked by %s. Should that host be gone, its lock ends within %.0f s: waiting.',
                        self._file.name, who, ELSEWHERE_SECONDS,
                    )  # fmt: skip
                time.sleep(1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logging.warning('%s: this file system has no locks, so nothing refuses a second job.', self._file.name)
                return None

    def _read(self) -> tuple[str, str | None]:
        """Who has it, in words, and on which host."""
        assert self._file is not None
        self._file.seek(0)
        try:
            found = json.loads(self._file.read())
            return f'process {found["pid"]} on {found["host"]}', found['host']
        except (ValueError, KeyError, TypeError):
            return 'another process', None  # Which is about to write who it is.

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _is_at(file: IO[str], path: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
