"""What every worker process of the data room does first. Nothing here imports torch."""

import os
import signal
import threading
import time


def leave_signals_to_the_parent() -> None:
    """Ignore stop signals, and end when the parent does.

    SLURM and terminals send TERM, USR2 and INT to every process of a job, but it is the parent that decides when
    to stop: at a step boundary, with its workers still there.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with(parent: int) -> None:
    """A parent that was killed outright tells nobody; a child is then handed to another."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
