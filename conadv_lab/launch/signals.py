"""Stop signals of a rank, kept from the processes that it starts.

SLURM sends USR2 and TERM to every process of a step. Forked loader workers would run the rank's handler too, and
spawned ones, whose handlers are reset, would die. So the rank blocks both signals, which every child inherits
whichever way it is started, and a thread of the rank waits for them and calls whatever handler is installed.
"""

import signal
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from threading import Thread

STOPS = (signal.SIGUSR2, signal.SIGTERM)


def take_over(handler: Callable[[int], None]) -> None:
    """Install ``handler``, called with the signal's number, and keep USR2 and TERM from later children.

    Call it in the main thread. Another handler may be installed afterwards with ``signal.signal``, as training
    does; it is then called in its place, perhaps in another thread than the main one. What a handler raises is
    printed, and later signals are delivered all the same.
    """
    for number in STOPS:
        signal.signal(number, lambda came, _frame: handler(came))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    # multiprocessing unblocks TERM when it first spawns, along with starting its tracker of shared memory.
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
