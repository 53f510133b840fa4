"""Worker processes of the data room: how they start, and end. Nothing here imports torch."""

import os
import signal
import threading
import time
from multiprocessing.context import ForkContext, ForkProcess


class _Worker(ForkProcess):
    def terminate(self) -> None:
        self.kill()


class WorkerContext(ForkContext):
    """Forks workers that leave TERM to the parent, so that what would end them by TERM has to kill them.

    A pool whose worker has died terminates the others and waits for them: with TERM alone for ever.
    """

    Process = _Worker  # type: ignore[assignment]


def leave_signals_to_the_parent() -> None:
    """Ignore stop signals, and end when the parent does.

    SLURM and terminals send TERM, USR2 and INT to every process of a job, but it is the parent that decides when
    to stop: at a step boundary, with its workers still there.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed outright tells nobody; a child is then handed to another."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
