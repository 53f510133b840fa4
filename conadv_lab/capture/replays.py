"""Functions without arguments that are run a few times, then captured, then replayed; one capture per kind."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

from conadv_lab.outside import Call, broken_by

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
        """Run it once, and also return a function that replays it; Python and operators have run once.

        What the part runs by `conadv_lab.outside.outside` is not captured: it lies between two graphs, and is called
        in every replay.

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
    """CUDA graphs on a separate stream; they share memory, as they are replayed in sequence.

    A part that sends messages is several graphs. What one of them leaves for the next, such as gradients, lies in the
    memory that they share, and keeps its place: it is not freed before the whole part has been captured.
    """

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
        graphs = _Graphs(self)
        failed: list[Exception] = []
        reason = None
        try:
            # The outer context restores the stream, which torch does not do if a capture cannot be ended.
            with torch.cuda.stream(self.stream), _no_autocast_cache(), graphs, broken_by(graphs.broken):
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
        self.replay(graphs.replay)
        return result, graphs.replay

    def graph(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _clear_up(self) -> None:
        """After a failed capture, restore memory and random numbers for running operator by operator.

        If CUDA aborts a capture, torch's allocator and random generator do not learn that it is over.
        """
        with suppress(RuntimeError):  # raised if it did learn
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
        # A successful capture resets the generator, which otherwise refuses numbers outside a capture.
        with suppress(RuntimeError), torch.cuda.stream(self.stream), self.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self.stream.device)

    def replay(self, graph: Callable[[], None]) -> None:
        self.run(graph)


class _Graphs:
    """A context that captures what runs in it, with a new graph after each call of `outside`.

    Nothing runs before all is captured, neither operators nor calls: if a later graph fails, no rank has sent a message
    that it would send again.
    """

    def __init__(self, owner: CudaGraphs) -> None:
        self.owner = owner
        self.parts: list[Call] = []
        self._open: torch.cuda.graph | None = None

    def __enter__(self) -> None:
        graph = torch.cuda.CUDAGraph()
        opened = self.owner.graph(graph, self.owner.pool)
        opened.__enter__()
        self._open = opened
        self.parts.append(graph.replay)

    def __exit__(self, *_: object) -> None:
        # Not an ExitStack, whose frame and error refer to each other: a failed capture's memory would live on.
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(None, None, None)

    def broken(self, call: Call) -> None:
        """End this graph, remember the call, and begin the next graph."""
        self.__exit__()
        self.parts.append(call)
        self.__enter__()

    def replay(self) -> None:
        for part in self.parts:
            part()


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
