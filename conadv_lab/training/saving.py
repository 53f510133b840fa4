"""Checkpoints are written beside the training: a step waits neither for the disk nor for other ranks.

On a GPU the copies of the state take their place in the stream of the training and the host goes on at once; on a CPU
a step waits for one copy in memory.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from conadv_lab.runs import RunFolder

ALIGNED = 64
"""Bytes at whose multiples tensors begin: a cache line."""


class Saver:
    """Writes one checkpoint at a time in a thread of its own; a context manager, which waits for the last one.

    The next save waits for the one before, so that at most one copy of the state is held. A failed save is
    raised by whichever of `save`, `check` and `wait` comes next, in the thread that trains.

    Attributes:
        step: of the newest checkpoint that was begun or loaded, or None.
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
        """Begin to save ``state`` as it is now, with the metrics as they stand now.

        Args:
            step: how many steps the state has behind it.
            state: nested dicts, lists and tuples of tensors and plain values.
            completed: what is to be written, made in the thread from the copy of the state, as with other ranks' parts.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are as they were.
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
        """Raise what the checkpoint that is being written has met so far."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once the checkpoint that was begun is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class Room:
    """Memory of the host for one copy of a state, kept for the next one; pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    @torch.no_grad()
    def copied(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """A copy of nested dicts, lists and tuples whose tensors lie here, and what waits until they have arrived.

        The copy is good until the next one is made.
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
        """Empty tensors like these, each with a storage of its own, as torch saves storages whole."""
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
    """A tensor of the same shape and memory format, whose values begin at a place of the memory."""
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
    """The same nest with other tensors in the places of its own."""
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
