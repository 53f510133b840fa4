"""How worker processes of the data package start and end. Nothing here imports torch."""

import os
import signal
import threading
import time
from multiprocessing.context import ForkContext, ForkProcess


class _Worker(ForkProcess):
    def terminate(self) -> None:
        self.kill()


class WorkerContext(ForkContext):
    """Forks workers that ignore TERM, so terminating them has to use KILL.

    When a worker dies, its pool terminates the others and waits for them; with TERM it would wait forever.
    """

    Process = _Worker  # type: ignore[assignment]


def leave_signals_to_the_parent() -> None:
    """Ignore stop signals, and exit when the parent does.

    SLURM and terminals send TERM, USR2 and INT to every process of a job, but the parent decides when to stop: at
    a step boundary, with its workers still alive.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Exit when reparented: a parent that was killed outright sends no notice."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
