"""Worker processes that read photographs straight into memory that all of them share.

The memory is mapped before the workers are forked, so it needs no file and no share of /dev/shm; nothing is copied
or pickled on the way back. Which worker makes an image does not matter for what it is.
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
"""Images of one task: long enough that handing it out costs nothing, short enough that workers end together."""

Draws = np.ndarray[Any, np.dtype[np.float32]]
REPLACE = (
    "put an intact image in its place and continue with --resume; without it the set is another one, for a new run "
    "with another --out"
)
DEAD_WORKER = "a loader worker died, killed or out of memory; fewer --workers may help"


class Reading:
    """Images under way to a slot."""

    def __init__(self, images: Tensor, tasks: Sequence[Future[None]]) -> None:
        self._images, self._tasks = images, tasks

    def wait(self) -> Tensor:
        """(n, 3, S, S) uint8, channels last in memory; good as long as its slot is this reading's.

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
        """Wait until nothing writes to the slot any more, whatever came of it."""
        for task in self._tasks:
            task.exception()


class Readers:
    """Reads and renders images into numbered slots of shared memory, in worker processes or in this one.

    Args:
        sets: photographs with the view that is taken of them; a reading names one by its place here.
        workers: processes; 0 reads in this one, when `begin` is called.
        slots: how many readings there is room for.
        slot_images: images of a slot.

    Raises:
        ValueError: more memory than there is.
    """

    chunk = CHUNK
    pixels_by = ""
    """Of a set's fingerprint: whose arithmetic makes the pixels, where it is not this package's own."""

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
        """Start to read photographs ``places`` (n,) of a set into a slot that nothing else uses.

        Args:
            which: the set.
            slot: from 0.
            places: of the photographs, at most ``slot_images``.
            draws: (n, DRAWS) for augmented images; None for images as they are.

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
        """Any number of images, in pieces that are good until the next is asked for; ``slots`` are used in turn.

        ``draws`` are as for `begin`.
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
                reading.settle()  # the slots are somebody else's next

    def render(self, which: int, slot: int, first: int, places: Numbers, draws: Draws | None) -> None:
        """Make images and write them to a slot, from its ``first``-th image on."""
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
    """Bytes that forked processes share; those that nobody writes to take no memory."""
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
