"""One job at a time trains in a run folder: two would take turns in the same metrics and checkpoints."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"
PATIENCE = 15.0
"""Seconds that the lock is waited for: a process that was killed a moment ago may still be ending."""
POLL = 0.2


class Claim:
    """A run folder's lock, and with it the right to write there; it ends with this process, however that ends.

    The lock is the operating system's on the file ``.lock``, so that a kill leaves nothing behind to clear away. It
    is a record lock, not ``flock``: loader workers forked by this process do not hold it on, NFS knows it, and it
    never stands between two runs of one process. Where a file system has no locks, nothing is kept.

    A context manager: what was taken is given back on leaving.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock, and note who has it for others to be told.

        One that an earlier stretch of this SLURM job seems to hold was left behind by a lost node, and is passed by.

        Raises:
            ValueError: another process trains there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / LOCK).open("a+")
        until = time.monotonic() + PATIENCE
        while not _locked(file):
            if time.monotonic() < until:
                time.sleep(POLL)
                continue
            holder = _noted(file)
            file.close()
            if _is_earlier_stretch(holder):
                warnings.warn(f"{self.folder} is still locked by an earlier stretch of job {holder['job']}")
                return
            raise ValueError(
                f"{self.folder} is being trained by {_told(holder)}; wait for it, end it, or pass another --out"
            )
        file.truncate(0)
        file.write(json.dumps(_own()))
        file.flush()
        self._file = file

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back, if it is held; where the run is finished, nobody needs its file any more."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if (self.folder / "result.json").exists():
            (self.folder / LOCK).unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # all else: no locks here
    return True


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _is_earlier_stretch(holder: dict[str, Any]) -> bool:
    own = _own()
    return bool(holder) and own["job"] == holder["job"] is not None and own["restarts"] > holder["restarts"]


def _noted(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # it has only just been locked
        return {}


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"
