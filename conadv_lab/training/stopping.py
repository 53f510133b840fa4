"""Stop requests: signals are only noted, and acted on between two steps; a second Ctrl-C does not wait for that."""

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
    """A signal asked the run to stop; its checkpoint is saved, and it can be resumed."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Names of the stop signals that came; each is only noted, and acted on between two steps.

    After a first INT the handler of before is back, so that a second one stops at once: the training command with
    the checkpoints that are there, a notebook's cell with a KeyboardInterrupt.
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
    except ValueError:  # not the main thread, as in some notebooks and tests: signals are somebody else's
        yield came
        return
    try:
        yield came
    finally:
        for old, handler in before.items():
            signal.signal(old, handler)


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """Let a Ctrl-C inside end this process at once, in whatever library it is, instead of raising KeyboardInterrupt."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield  # somebody else's, ignored, or of a thread that may set none
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
