"""Functions without arguments that are run a few times, then captured, then replayed; one capture a kind."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")
WARM = 3
"""Runs before a capture: what happens at first alone, such as choosing algorithms, cannot be captured."""


class CannotCapture(RuntimeError):
    """Why something cannot be captured, in a sentence."""


class Backend(Protocol):
    """Who captures. Memory that a captured function returns is good until anything is captured or replayed next."""

    def run(self, part: Callable[[], Result]) -> Result:
        """Run it as it is, where it will be captured later."""

    def capture(self, part: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Run it once and return what replays its operators; both its Python and its operators have happened once.

        Raises:
            CannotCapture: neither has an effect, but on what lies in ``.grad``.
        """

    def replay(self, graph: Callable[[], None]) -> None:
        """Run its operators again."""


class Replays:
    """Runs parts of a step by their kind.

    Args:
        backend: who captures; None runs everything operator by operator.
    """

    def __init__(self, backend: Backend | None) -> None:
        self.backend = backend
        self.runs: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[Any, Callable[[], None]]] = {}

    def __call__(self, kind: Hashable | None, part: Callable[[], Result]) -> tuple[Result, bool]:
        """What the part returns, and whether its Python was run.

        Raises:
            CannotCapture: the part has to be run once more, without a backend.
        """
        if self.backend is None or kind is None:
            return part(), True
        if kind in self.graphs:
            result, graph = self.graphs[kind]
            self.backend.replay(graph)
            return result, False
        self.runs[kind] = self.runs.get(kind, 0) + 1
        if self.runs[kind] <= WARM:
            return self.backend.run(part), True
        self.graphs[kind] = self.backend.capture(part)
        return self.graphs[kind][0], True


class CudaGraphs:
    """CUDA graphs on a stream of their own; they share memory, as they are replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, part: Callable[[], Result]) -> Result:
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = part()
        here.wait_stream(self.stream)
        return result

    def capture(self, part: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = part()
        except (RuntimeError, torch.AcceleratorError) as error:
            raise CannotCapture(_reason(error)) from error
        self.replay(graph.replay)
        return result, graph.replay

    def replay(self, graph: Callable[[], None]) -> None:
        self.run(graph)


def _reason(error: BaseException) -> str:
    # Ending a capture that went wrong raises an error of its own, which hides the first one.
    first: BaseException = error
    while first.__context__ is not None:
        first = first.__context__
    if isinstance(first, torch.OutOfMemoryError):
        return "the GPU's memory does not suffice for a captured step"
    return str(first).splitlines()[0]
