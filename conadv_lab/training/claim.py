"""Only one job at a time may train in a run folder: two would mix their metrics and checkpoints."""

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
"""Seconds to wait for the lock: a process that was just killed may still be exiting."""
POLL = 0.2


class Claim:
    """A run folder's lock, and with it the right to write there; released when this process ends in any way.

    It is an operating-system lock on the file ``.lock``, so a kill leaves nothing to clean up. It is a record lock,
    not ``flock``: forked loader workers do not keep it, NFS supports it, and two runs in one process do not block
    each other. On file systems without locks it does nothing.

    A context manager that releases the lock on exit.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock, and record the holder for other processes' error messages.

        A lock held by an earlier attempt of this SLURM job was left behind by a lost node, and is ignored.

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
            if _is_earlier_attempt(holder):
                warnings.warn(f"{self.folder} is still locked by an earlier attempt of job {holder['job']}")
                return
            raise ValueError(
                f"{self.folder} is being trained by {_told(holder)}; wait for it, stop it, or pass another --out"
            )
        file.truncate(0)
        file.write(json.dumps(_own()))
        file.flush()
        self._file = file

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, if held; delete its file once the run is finished."""
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


def _is_earlier_attempt(holder: dict[str, Any]) -> bool:
    own = _own()
    return bool(holder) and own["job"] == holder["job"] is not None and own["restarts"] > holder["restarts"]


def _noted(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # it was locked a moment ago
        return {}


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"
