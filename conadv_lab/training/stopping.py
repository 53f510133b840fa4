"""Stop requests: signals are only noted, and acted on between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StoppedOnRequest(Exception):
    """A signal asked the run to stop; its checkpoint is saved, and it can be resumed."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Names of the stop signals that came; each is only noted, and acted on between two steps."""
    came: list[str] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, as in some notebooks and tests: signals are somebody else's
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
