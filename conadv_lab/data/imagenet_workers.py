"""Worker processes that read photographs straight into shared memory.

The memory is mapped before the workers are forked, so it needs no file and no room in /dev/shm; nothing is copied
or pickled on the way back. An image does not depend on which worker made it.
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conadv_lab.data.decode import Decoder
from conadv_lab.data.imagenet_files import Numbers, Photos
from conadv_lab.data.imagenet_view import View
from conadv_lab.data.workers import WorkerContext, leave_signals_to_the_parent

CHUNK = 32
"""Images per task: enough that dispatching costs nothing, few enough that workers finish together."""

Draws = np.ndarray[Any, np.dtype[np.float32]]
REPLACE = (
    "replace it with an intact copy and continue with --resume; leaving it out changes the data set, which needs a new "
    "run with another --out"
)
DEAD_WORKER = "a loader worker died, killed or out of memory; try fewer --workers"


class Reading:
    """Images being read into a slot."""

    def __init__(self, images: Tensor, tasks: Sequence[Future[None]]) -> None:
        self._images, self._tasks = images, tasks

    def wait(self) -> Tensor:
        """(n, 3, S, S) uint8, channels last in memory; valid until the slot is reused.

        Raises:
            OSError: an image cannot be read, or a worker died.
        """
        try:
            for task in self._tasks:
                task.result()
        except ValueError as broken:
            raise OSError(f"{broken}; {REPLACE}") from None
        except BrokenProcessPool:
            raise OSError(DEAD_WORKER) from None
        return self._images

    def settle(self) -> None:
        """Wait until nothing writes to the slot, ignoring errors."""
        for task in self._tasks:
            task.exception()


class Readers:
    """Reads and renders images into numbered slots of shared memory, in worker processes or in this one.

    Args:
        sets: photographs and their views; readings refer to them by position.
        workers: processes; 0 reads in this process, when `begin` is called.
        slots: number of slots.
        slot_images: images per slot.

    Raises:
        ValueError: not enough memory.
    """

    chunk = CHUNK
    pixels_by = ""
    """Added to a set's fingerprint: what made the pixels, if not this package."""

    def __init__(
        self, sets: Sequence[tuple[Photos, View]], workers: int, slots: int, slot_images: int
    ) -> None:
        self.sets, self.workers = list(sets), workers
        self.slots, self.slot_images = slots, slot_images
        self.image_bytes = 3 * max(view.side for _, view in sets) ** 2
        self._memory = _shared_memory(slots * slot_images * self.image_bytes)
        self._decoder = Decoder()
        self._pool: ProcessPoolExecutor | None = None

    def begin(self, which: int, slot: int, places: Numbers, draws: Draws | None) -> Reading:
        """Start reading photographs ``places`` (n,) of a set into a slot that nothing else uses.

        Args:
            which: the set's number.
            slot: from 0.
            places: indices of the photographs, at most ``slot_images``.
            draws: (n, DRAWS) for augmented images; None for unaugmented ones.

        Raises:
            OSError: a worker died.
        """
        tasks: list[Future[None]] = []
        images = self._slot(which, slot, len(places))
        for first in range(0, len(places), self.chunk):
            part = slice(first, first + self.chunk)
            chunk = (which, slot, first, places[part], None if draws is None else draws[part])
            if self.workers:
                tasks.append(self._submitted(*chunk))
            else:
                tasks.append(_done(self, *chunk))
        return Reading(images.permute(0, 3, 1, 2), tasks)

    def read(
        self, which: int, slots: Sequence[int], places: Numbers, draws: Draws | None = None
    ) -> Iterator[Tensor]:
        """Read any number of images in pieces, each valid until the next one is requested; uses ``slots`` in turn.

        ``draws`` as for `begin`.
        """
        count = max(1, -(-len(places) // self.slot_images))
        parts = np.array_split(np.arange(len(places)), count)
        begun: list[Reading] = []

        def begin(number: int) -> None:
            part, slot = parts[number], slots[number % len(slots)]
            begun.append(self.begin(which, slot, places[part], None if draws is None else draws[part]))

        try:
            for number in range(min(len(slots), count)):
                begin(number)
            for number in range(count):
                yield begun[number].wait()
                if number + len(slots) < count:
                    begin(number + len(slots))
        finally:
            for reading in begun:
                reading.settle()  # the slots will be reused

    def render(self, which: int, slot: int, first: int, places: Numbers, draws: Draws | None) -> None:
        """Make images and write them to a slot, starting at image ``first``."""
        photos, view = self.sets[which]
        out = self._slot(which, slot, first + len(places))[first:]
        for row, place in enumerate(places.tolist()):
            content, name = photos.read(place), photos.name(place)
            if draws is None:
                out[row] = view.as_it_is(content, name, self._decoder)
            else:
                out[row] = view.augmented(content, name, self._decoder, draws[row].tolist())

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _slot(self, which: int, slot: int, count: int) -> Tensor:
        side = self.sets[which][1].side
        start = slot * self.slot_images * self.image_bytes
        return self._memory[start : start + count * 3 * side**2].view(count, side, side, 3)

    def _submitted(self, *chunk: Any) -> Future[None]:
        try:
            return self._workers().submit(_render, *chunk)
        except BrokenProcessPool:
            raise OSError(DEAD_WORKER) from None

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, WorkerContext(), _begin_work, (self,))
        return self._pool


def _shared_memory(size: int) -> Tensor:
    """Bytes shared by forked processes; pages that are never written take no memory."""
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    except OSError as error:
        raise ValueError(
            f"could not allocate the image buffer of {size / 1e9:,.1f} GB ({error.strerror}); "
            "reduce micro_batch, keep_gb or workers"
        ) from None


_readers: Readers | None = None


def _begin_work(readers: Readers) -> None:
    global _readers
    leave_signals_to_the_parent()
    torch.set_num_threads(1)
    _readers = readers


def _render(*chunk: Any) -> None:
    assert _readers is not None
    _readers.render(*chunk)


def _done(readers: Readers, *chunk: Any) -> Future[None]:
    task: Future[None] = Future()
    try:
        readers.render(*chunk)
        task.set_result(None)
    except ValueError as error:
        task.set_exception(error)
    return task
