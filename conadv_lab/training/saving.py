"""Checkpoints are written beside the training: a step waits for a copy of its state in memory, not for the disk."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from conadv_lab.runs import RunFolder


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

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save ``state`` as it is now, with the metrics as they stand now.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are as they were.
        """
        self.wait()
        size = self.folder.metrics_size()
        self._writing = self._thread.submit(self.folder.save_checkpoint, step, copied(state), size)
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


def copied(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors are in the host's memory and no longer change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        made = copy.copy(state)  # a module's state has its versions as an attribute
        for key, value in state.items():
            made[key] = copied(value)
        return made
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state
