"""What a captured step runs outside its graphs, such as messages to other ranks.

While a step is captured, `outside` breaks its graph in two and remembers the call; a replay runs the first graph, the
call, and the second graph. Everywhere else `outside` only makes the call. So code that sends messages need not know
whether, or how, steps are captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Call = Callable[[], Any]
_breaks: ContextVar[Callable[[Call], None] | None] = ContextVar("breaks", default=None)


def outside(call: Call) -> None:
    """Make a call that no graph can hold.

    Args:
        call: is made once per replay too, so it must only use tensors that stay where they are; what it returns is
            dropped. If a step is being captured, the call may be made later than here.

    >>> outside(lambda: print("now"))
    now
    """
    broken = _breaks.get()
    if broken is None:
        call()
    else:
        broken(call)


def is_captured() -> bool:
    """Whether this code runs to be captured, so that it must not read values back."""
    return _breaks.get() is not None


@contextmanager
def broken_by(breaks: Callable[[Call], None]) -> Iterator[None]:
    """Calls of `outside` within go to ``breaks``."""
    before = _breaks.set(breaks)
    try:
        yield
    finally:
        _breaks.reset(before)
