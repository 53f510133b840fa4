"""Access to gradients shared over ranks; the default is a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Gradients:
    """A method's access to gradients that several ranks compute together; here for a single process."""

    rank: int = 0
    ranks: int = 1
    spread: bool = False

    @contextmanager
    def summed(self) -> Iterator[None]:
        """On exit, gradients computed inside are summed over all ranks; ``.grad`` must be empty on entry."""
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Gradients computed inside stay on this rank, and no other rank waits for them."""
        yield

    def is_complete(self) -> None:
        """Declare that ``.grad`` is already equal on all ranks and must not be summed again at the end of the step."""

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        return value


ALONE = Gradients()
