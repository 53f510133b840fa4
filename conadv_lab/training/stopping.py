"""Stop requests: signals are recorded and acted on between two steps; a second Ctrl-C stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
HINT = b"saving after this step; Ctrl-C again stops at once\n"


class StoppedOnRequest(Exception):
    """A signal stopped the run; its checkpoint is saved, and it can be resumed."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collect the names of stop signals, to be acted on between two steps.

    The first INT restores the previous handler, so that a second one stops at once: the training command exits with
    the existing checkpoints, a notebook cell raises KeyboardInterrupt.
    """
    came: list[str] = []
    before: dict[int, Any] = {n: signal.getsignal(n) or signal.SIG_DFL for n in STOP_SIGNALS}

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            with suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, HINT if os.environ.get("RANK", "0") == "0" else b"")

    try:
        for stop in STOP_SIGNALS:
            signal.signal(stop, note)
    except ValueError:  # not the main thread, as in some notebooks and tests: cannot handle signals
        yield came
        return
    try:
        yield came
    finally:
        for old, handler in before.items():
            signal.signal(old, handler)


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """Let Ctrl-C inside the block end this process at once, in whatever library, without a KeyboardInterrupt."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield  # another handler, ignored, or a thread that cannot set one
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
