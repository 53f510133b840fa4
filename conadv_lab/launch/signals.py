"""Stop signals of a rank, kept away from its child processes.

SLURM sends USR2 and TERM to every process of a job step. Forked loader workers would run the rank's handler too, and
spawned ones, whose handlers are reset, would die. So the rank blocks both signals, every child inherits the mask
however it is started, and a thread of the rank waits for the signals and calls the installed handler.
"""

import signal
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from threading import Thread

STOPS = (signal.SIGUSR2, signal.SIGTERM)


def take_over(handler: Callable[[int], None]) -> None:
    """Install ``handler``, called with the signal's number, and keep USR2 and TERM from later children.

    Call it in the main thread. A handler that is installed later with ``signal.signal``, as training does, replaces
    this one and may be called outside the main thread. An exception in a handler is printed, and later signals are
    still delivered.
    """
    for number in STOPS:
        signal.signal(number, lambda came, _frame: handler(came))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    # multiprocessing unblocks TERM when it starts its resource tracker, so start that first and block again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    Thread(target=_deliver, name="stop-signals", daemon=True).start()


def _deliver() -> None:
    while True:
        number = signal.sigwait(STOPS)
        handler = signal.getsignal(number)
        try:
            if callable(handler):
                handler(number, None)
        except Exception:  # the next signal needs this thread
            traceback.print_exc()
