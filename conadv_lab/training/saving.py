"""Writes checkpoints in the background: a step waits neither for the disk nor for other ranks.

On a GPU the copies of the state are queued in the training stream and the host continues at once; on a CPU a step
waits for one copy in memory.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from conadv_lab.runs import RunFolder

ALIGNED = 64
"""Alignment of tensors in bytes: a cache line."""


class Saver:
    """Writes one checkpoint at a time in its own thread; a context manager that waits for the last one.

    A save waits for the previous one, so at most one copy of the state is held. An error is raised by the next call
    of `save`, `check` or `wait`, in the training thread.

    Attributes:
        step: of the latest checkpoint that was started or loaded, or None.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.step: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._writing: Future | None = None
        self._room = Room()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def save(
        self, step: int, state: dict[str, Any], completed: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        """Start saving the current ``state`` and metrics.

        Args:
            step: number of completed steps.
            state: nested dicts, lists and tuples of tensors and plain values.
            completed: called in the thread with the copy of the state; returns what to write, for example with
                other ranks' parts.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are intact.
        """
        self.wait()
        size = self.folder.metrics_size()
        kept, arrived = self._room.copied(state)

        def write() -> None:
            arrived()
            whole = kept if completed is None else completed(kept)
            self.folder.save_checkpoint(step, whole, size)

        self._writing = self._thread.submit(write)
        self.step = step

    def check(self) -> None:
        """Raise any error of the checkpoint being written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the started checkpoint is on disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class Room:
    """Host memory for one copy of a state, reused for the next one; pinned if the state is on a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    @torch.no_grad()
    def copied(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """A copy of nested dicts, lists and tuples with tensors in this memory, and a function that waits for it.

        Valid until the next copy.
        """
        tensors = list(_tensors(state))
        copies = self._places(tensors)
        for place, tensor in zip(copies, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if on_gpu is None:
            return _with_tensors(state, iter(copies)), lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(on_gpu))
        return _with_tensors(state, iter(copies)), event.synchronize

    def _places(self, tensors: list[Tensor]) -> list[Tensor]:
        """Empty tensors like these, each with its own storage, since torch saves whole storages."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        pinned = any(tensor.is_cuda for tensor in tensors)
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        memory: Any = self._bytes.numpy()
        return [_like(tensor, memory, start) for tensor, start in zip(tensors, starts, strict=True)]


def _like(tensor: Tensor, memory: Any, start: int) -> Tensor:
    """A tensor of the same shape and memory format, at offset ``start`` of the memory."""
    count = tensor.numel()
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    row = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=start)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return row.as_strided(tensor.shape, tensor.stride())
    return row.view(tensor.shape)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _with_tensors(state: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nested structure with its tensors replaced."""
    if isinstance(state, Tensor):
        return next(tensors)
    if isinstance(state, dict):
        made = copy.copy(state)  # a module's state has its versions as an attribute
        for key, value in state.items():
            made[key] = _with_tensors(value, tensors)
        return made
    if isinstance(state, (list, tuple)):
        return type(state)([_with_tensors(value, tensors) for value in state])
    return state
