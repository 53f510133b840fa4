"""Who else has a share of a step's gradient: nobody, unless a run over ranks says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Gradients:
    """What a method may ask about gradients that several ranks make together; here one process makes them alone."""

    rank: int = 0
    ranks: int = 1
    spread: bool = False

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Gradients that are made within are the sum over all ranks on leaving; ``.grad`` is empty on entering."""
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Gradients that are made within are this rank's own, and nobody waits for them."""
        yield

    def is_complete(self) -> None:
        """What lies in ``.grad`` is the same on all ranks and must not be summed again at the step's end."""

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        return value


ALONE = Gradients()
