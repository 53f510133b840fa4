"""Reading photographs: images/s per core, and how much of that the loader delivers.

    python -m benchmarks.reading [--json FILE] [--data-dir DIR] [--images N] [--workers N]

DIR holds train/<class>/<photograph>; without it, synthetic photographs of ImageNet's usual size are used, which is
less representative. Every image is decoded, cropped at random, resized to 224 pixels with antialiasing, and flipped
with p = 0.5. The peer is Pillow with the operations of torchvision's transforms, on the same crops. The first rows are
images per second of processor time, so a busy machine does not change them; the ratio is ours over the peer's. The
loader's rows are images per second of wall-clock time; the ratio is the loader's rate over that of a bare loop in as
many processes, which does the same work, crop for crop, and hands nothing over. Run them on an idle machine. If DALI
is installed (extra dali), a row has its rate on the CPU too.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Options, Row, Times, interleaved, publish
from conadv_lab.cli import asked
from conadv_lab.cores import cores
from conadv_lab.data.crops import CROP_DRAWS, crop_box
from conadv_lab.data.decode import Decoder, decode_with_pillow
from conadv_lab.data.hashing import image_keys, uniform
from conadv_lab.data.imagenet import PhotoSet, read_ahead
from conadv_lab.data.imagenet_dali import DaliReaders
from conadv_lab.data.imagenet_files import Photos
from conadv_lab.data.imagenet_stream import PhotoStream
from conadv_lab.data.imagenet_view import DRAWS, View
from conadv_lab.data.imagenet_workers import Readers
from conadv_lab.data.pack import main as pack_command
from conadv_lab.data.pack_file import open_split
from conadv_lab.mistakes import require

VIEW = View(side=224, resize=256)
BATCH = 64
PEER = "Pillow and torchvision-style code"


def draws_of(count: int) -> list[list[float]]:
    keys = image_keys(0, "photo", torch.tensor(0), torch.arange(count))
    return uniform(keys, DRAWS).tolist()


def ours(photos: Photos, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """Read photographs one after another in one process with this package; returns the last ones, (64, 224, 224, 3)."""
    decoder, out = Decoder(), torch.empty(BATCH, 224, 224, 3, dtype=torch.uint8)
    for i, numbers in enumerate(draws):
        place = i % len(photos.labels)
        out[i % BATCH] = VIEW.augmented(photos.read(place), photos.name(place), decoder, numbers)
    return out


def peers(photos: Photos, draws: Sequence[Sequence[float]]) -> torch.Tensor:
    """The same in torchvision's way: open, RGB, RandomResizedCrop, flip, to a (C, H, W) tensor."""
    out = torch.empty(BATCH, 3, 224, 224, dtype=torch.uint8)
    for i, numbers in enumerate(draws):
        image = Image.open(io.BytesIO(photos.read(i % len(photos.labels)))).convert("RGB")
        top, left, height, width = crop_box(image.height, image.width, numbers[:CROP_DRAWS])
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((224, 224), Image.Resampling.BILINEAR)
        if numbers[CROP_DRAWS] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[i % BATCH] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return out


def of_a_core(calls: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Like `interleaved`, in seconds of processor time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    return Times(seconds)


def core_rows(full: Photos, pack: Photos, images: int, rounds: int) -> list[Row]:
    draws = draws_of(images)
    calls: dict[str, Callable[[], Any]] = {
        PEER: lambda: peers(full, draws),
        "full size": lambda: ours(full, draws),
        "pack 400": lambda: ours(pack, draws),
    }
    with contextlib.suppress(ValueError):  # it is not installed
        dali = DaliReaders([(full, VIEW)], workers=0, slots=1, slot_images=BATCH)
        calls["full size, DALI"] = lambda: by_dali(dali, draws)
    times = of_a_core(calls, rounds)
    rows = [Row(PEER, images / times.median(PEER), "images/s of a core")]
    for name in calls:
        if name != PEER:
            rows.append(_faster(name, times, images, PEER, "images/s of a core"))
    return rows


def by_dali(readers: DaliReaders, draws: Sequence[Sequence[float]]) -> None:
    """Like `ours`, one batch at a time."""
    photos, numbers = len(readers.sets[0][0].labels), np.array(draws, np.float32)
    for first in range(0, len(draws), BATCH):
        readers.begin(0, 0, np.arange(first, first + BATCH) % photos, numbers[first : first + BATCH]).wait()


def _faster(name: str, times: Times, images: int, peer: str, unit: str, shown: str = "") -> Row:
    ratios = [b / a for a, b in zip(times.seconds[name], times.seconds[peer], strict=True)]
    return Row(name, images / times.median(name), unit, shown or peer, median(ratios))


_photos: list[Any] = []


def _begin(photos: Photos) -> None:
    torch.set_num_threads(1)
    _photos[:] = [photos]


def _bare_part(draws: list[list[float]]) -> None:
    ours(_photos[0], draws)


def loader_rows(name: str, photos: Photos, images: int, workers: int, rounds: int) -> list[Row]:
    """The loader's rate, and its share of the rate of a bare loop in as many processes."""
    draws = draws_of(images)
    parts = [draws[i::workers] for i in range(workers)]
    slots = 2 + 2 * (1 + read_ahead(workers, BATCH))
    readers = Readers([(photos, VIEW), (photos, VIEW)], workers, slots, BATCH)
    every = torch.arange(len(photos.labels)).repeat(-(-images // len(photos.labels)))[:images]

    def loader() -> None:
        """One epoch from a new stream: nothing is read before the clock starts, and nothing is left when it stops."""
        stream = PhotoStream(PhotoSet(readers, 1, every, drawn=0), seed=0, batch=BATCH, steps=images // BATCH)
        for first in range(0, images, BATCH):
            stream.pixels(first, first + BATCH)

    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (photos,))
    with contextlib.closing(readers), pool:
        bare = f"bare loop {name}"
        calls = {bare: lambda: list(pool.map(_bare_part, parts)), f"loader {name}": loader}
        times = interleaved(calls, rounds)
    unit = f"images/s on {workers} cores"
    rows = [Row(bare, images / times.median(bare), unit)]
    return [*rows, _faster(f"loader {name}", times, images, bare, unit)]


def equal_row(photos: Photos) -> Row:
    """The number of photographs that decode to exactly Pillow's pixels."""
    decoder = Decoder()
    contents = [photos.read(i) for i in range(len(photos.labels))]
    same = sum(np.array_equal(decoder(c, "x"), decode_with_pillow(c, "x")) for c in contents)
    return Row("pixels equal", same, "photographs", "all of them", same / len(contents))


def made_photographs(root: Path, count: int = 40) -> Path:
    """Photographs of 500 × 375 pixels and about 100 kB, waves with noise."""
    folder = root / "train" / "n00000000"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:375, :500]
    for seed in range(count):
        draw = np.random.default_rng(seed)
        waves = np.stack([np.sin(x / draw.uniform(9, 60) + y / draw.uniform(9, 60)) for _ in range(3)], -1)
        pixels = 128 + 90 * waves + draw.normal(0, 9, (375, 500, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{seed}.JPEG", quality=93, subsampling=0)
    return root


@dataclass(frozen=True)
class ReadingOptions(Options):
    rounds: int = 5
    data_dir: Path | None = None  # A folder of train/CLASS/PHOTOGRAPH; None: synthetic photographs.
    images: int = 512  # Photographs per timed call.
    workers: int = field(default_factory=cores)  # Processes of the loader, usually one per core.


def main() -> None:
    options = asked(ReadingOptions, None, "benchmarks.reading", __doc__)
    require(options.images >= BATCH, "images", options.images, f"at least {BATCH}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.data_dir or made_photographs(Path(scratch))
        with contextlib.redirect_stdout(io.StringIO()):
            status = pack_command([str(root), f"{scratch}/packs", "--splits", "train"])
        if status:
            raise SystemExit(status)
        full, pack = open_split(root, "train"), open_split(f"{scratch}/packs", "train")
        images = options.images // BATCH * BATCH
        rows = [equal_row(full), *core_rows(full, pack, images, options.rounds)]
        rows += loader_rows("full size", full, images, options.workers, options.rounds)
        rows += loader_rows("pack 400", pack, images, options.workers, options.rounds)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
