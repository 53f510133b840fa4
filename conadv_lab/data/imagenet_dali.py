"""Photographs decoded, cropped, resized and flipped by NVIDIA DALI, on the GPU or on the CPU; the extra ``dali``.

We pass DALI every box and flip, so images remain functions of (seed, epoch, index), but the pixels differ slightly from
the native reader's: on a CPU the decoders agree, but resizing does not quite. On 100 photographs of ImageNet, cropped
at random to 224 pixels, 99.97 % of the values were within 1 of 255 of the native reader's, the mean difference was 0.16
and the largest, at an edge of the crop, 13 (DALI 2.4 on a CPU, where it is slower than the native reader). The GPU
decoder's output and speed are not measured.

The native reader's code renders, or refuses, files that are not ordinary JPEGs (PNG, CMYK, trailing bytes, truncated:
see `jpeg_size`).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import torch

from conadv_lab import extras
from conadv_lab.data.crops import Box, centre_place
from conadv_lab.data.decode import Content, jpeg_size
from conadv_lab.data.imagenet_files import Numbers, Photos
from conadv_lab.data.imagenet_view import View
from conadv_lab.data.imagenet_workers import Draws, Readers

CHUNK = 128
"""Images per DALI batch: enough to fill a GPU's decoder, few enough for its memory."""
FIELDS = ("files", "start", "shape", "size", "corner", "side", "mirrored")

Cut = tuple[Box, Box, bool]
"""The box to cut out; the size to resize it to and the corner of the square in it; whether to flip."""


class DaliReaders(Readers):
    """`Readers` that decode and resize with DALI, using ``workers`` threads in this process instead of processes.

    While one batch is decoded, the files of the next are read. Images end up in the same host memory slots wherever
    they are made, so caching and waiting work as for other readers.

    Args:
        device: a GPU, to use its decoder ("mixed" in DALI's terms), or the CPU.

    Raises:
        ValueError: DALI is not installed.
    """

    chunk = CHUNK

    def __init__(
        self,
        sets: Sequence[tuple[Photos, View]],
        workers: int,
        slots: int,
        slot_images: int,
        device: torch.device | str = "cpu",
    ) -> None:
        require_dali()
        super().__init__(sets, workers, slots, slot_images)
        self.device = torch.device(device)
        self.pixels_by = f", pixels by DALI on {self.device.type}"
        self._pipeline: Any = None
        self._one_at_a_time = Lock()
        self._threads: ThreadPoolExecutor | None = None

    def render(self, which: int, slot: int, first: int, places: Numbers, draws: Draws | None) -> None:
        photos, view = self.sets[which]
        out = self._slot(which, slot, first + len(places))[first:]
        numbers: list[Any] = [None] * len(places) if draws is None else draws.tolist()
        contents = [photos.read(place) for place in places.tolist()]
        cuts: dict[int, Cut] = {}
        for row, size in enumerate(map(jpeg_size, contents)):
            if size is not None:
                cuts[row] = cut_of(view, *size, draws=numbers[row])
        with self._one_at_a_time:
            for row in range(len(places)):
                if row not in cuts:
                    drawn = None if draws is None else draws[row : row + 1]
                    super().render(which, slot, first + row, places[row : row + 1], drawn)
            if cuts:
                named = [(contents[row], photos.name(int(places[row]))) for row in cuts]
                images = self._made(named, list(cuts.values()), view.side)
                out.numpy()[list(cuts)] = images.as_array()
        if view.erasing and draws is not None:
            for row in cuts:
                view.erase(out[row], numbers[row])

    def close(self) -> None:
        """End the threads and release DALI's memory."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._threads = self._pipeline = None

    def _submitted(self, *chunk: Any) -> Future[None]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2)  # one decodes while the other reads
        return self._threads.submit(self.render, *chunk)

    def _made(self, named: Sequence[tuple[Content, str]], cuts: Sequence[Cut], side: int) -> Any:
        """DALI's list of (side, side, 3) uint8 images on the host, valid until the next call."""
        if self._pipeline is None:
            on_gpu = self.device.type == "cuda"
            number = (self.device.index or 0) if on_gpu else None
            self._pipeline = pipeline(min(CHUNK, self.slot_images), max(1, self.workers), number)
        table = np.array([(*box, *placed) for box, placed, _ in cuts])
        start, shape, corner, size = (np.ascontiguousarray(table[:, i : i + 2]) for i in (0, 2, 4, 6))
        values = (
            [np.frombuffer(content, np.uint8) for content, _ in named],
            start,
            shape,
            size.astype(np.float32),
            corner,
            np.full_like(corner, side),
            np.array([mirrored for *_, mirrored in cuts], np.int32),
        )
        for field, value in zip(FIELDS, values, strict=True):
            self._pipeline.feed_input(field, value)
        try:
            (images,) = self._pipeline.run()
        except RuntimeError as error:
            for content, name in named:
                self._decoder(content, name)  # raises an error that names the broken file
            raise ValueError(f"DALI cannot decode one of {named[0][1]} …: {_reason(error)}") from None
        return images if self.device.type == "cpu" else images.as_cpu()


def cut_of(view: View, height: int, width: int, draws: Sequence[float] | None) -> Cut:
    """How a view crops a photograph of that size: at random by ``draws``, or centred."""
    if draws is None:
        return (0, 0, height, width), centre_place(height, width, view.resize, view.side), False
    return view.box(height, width, draws), (0, 0, view.side, view.side), view.mirrored(draws)


def pipeline(batch: int, threads: int, gpu: int | None) -> Any:
    """A DALI pipeline with `FIELDS` as its inputs; decodes on the given GPU, or on the CPU for None."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    def decode_crop_resize_flip() -> Any:
        files, start, shape, size, corner, side, mirrored = (fn.external_source(name=name) for name in FIELDS)
        cut = fn.decoders.image_slice(
            files,
            start,
            shape,
            axes=[0, 1],
            device="cpu" if gpu is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as in libjpeg, and so in the native reader
        )
        resized = fn.resize(cut, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(fn.slice(resized, corner, side, axes=[0, 1]), horizontal=mirrored)

    made = decode_crop_resize_flip()
    made.build()
    return made


def require_dali() -> None:
    """Raise ``ValueError`` that says how to install DALI if it is missing."""
    extras.load("nvidia.dali", "dali", "reader 'dali'")


def _reason(error: RuntimeError) -> str:
    """The error line of DALI's message, which follows a traceback of the pipeline's definition."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("Error") or "rror:" in line), lines[0])
