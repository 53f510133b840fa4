"""Functions without arguments that are run a few times, then captured, then replayed; one capture per kind."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")
WARM = 3
"""Runs before a capture: first-time work, such as choosing algorithms, cannot be captured."""


class CannotCapture(RuntimeError):
    """The reason why something cannot be captured, in one sentence."""


class Backend(Protocol):
    """Captures functions. Memory that a captured function returns is valid until the next capture or replay."""

    def run(self, part: Callable[[], Result]) -> Result:
        """Run it normally, where it will be captured later."""

    def capture(self, part: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Run it once, and also return a function that replays its operators; Python and operators have run once.

        Raises:
            CannotCapture: neither had an effect, except on ``.grad``.
        """

    def replay(self, graph: Callable[[], None]) -> None:
        """Replay its operators."""


class Replays:
    """Runs parts of a step by their kind.

    Args:
        backend: captures; None runs everything operator by operator.
    """

    def __init__(self, backend: Backend | None) -> None:
        self.backend = backend
        self.runs: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[Any, Callable[[], None]]] = {}

    def __call__(self, kind: Hashable | None, part: Callable[[], Result]) -> tuple[Result, bool]:
        """The part's result, and whether its Python code ran.

        Raises:
            CannotCapture: the part must be run again, without a backend.
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
    """CUDA graphs on a separate stream; they share memory, as they are replayed in sequence."""

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
        failed: list[Exception] = []
        reason = None
        try:
            # The outer context restores the stream, which torch does not do if a capture cannot be ended.
            with torch.cuda.stream(self.stream), _no_autocast_cache(), self._graph(graph, self.pool):
                try:
                    result = part()
                # Ending the capture may raise another error, which would hide this one.
                except Exception as error:
                    failed.append(error)
                    raise
        except RuntimeError as error:
            if failed and not isinstance(failed[0], RuntimeError):
                raise failed.pop() from None
            reason = _reason(failed.pop() if failed else error)
        if reason is not None:  # not above, where the error keeps the capture's memory alive
            self._clear_up()
            raise CannotCapture(reason)
        self.replay(graph.replay)
        return result, graph.replay

    def _graph(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _clear_up(self) -> None:
        """After a failed capture, restore memory and random numbers for running operator by operator.

        If CUDA aborts a capture, torch's allocator and random generator do not learn that it is over.
        """
        with suppress(RuntimeError):  # raised if it did learn
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
        # A successful capture resets the generator, which otherwise refuses numbers outside a capture.
        with suppress(RuntimeError), torch.cuda.stream(self.stream), self._graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self.stream.device)

    def replay(self, graph: Callable[[], None]) -> None:
        self.run(graph)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Cast weights inside the graph: a cached cast from before would stay constant in all replays."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "there is not enough GPU memory for a captured step"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if "stream is capturing" in first:
        return f"the model, the loss or the method does what a graph cannot hold, such as .item() ({first})"
    return first
