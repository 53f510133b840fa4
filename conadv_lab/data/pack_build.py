"""Builds a pack: in parallel, resumable at any time; it is complete or absent under its final name.

During the build ``train.pack.part`` has the images so far and ``train.pack.part-log`` a line of JSON with the
settings, then 12 bytes per image: size and hash. A resumed build keeps every image whose hash matches.
"""

import io
import json
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from tqdm import tqdm

from conadv_lab.cores import cores
from conadv_lab.data.decode import Decoder
from conadv_lab.data.imagenet_files import Photos
from conadv_lab.data.pack_file import HEAD, finish, hash_of, open_pack, open_split
from conadv_lab.data.workers import WorkerContext, leave_signals_to_the_parent
from conadv_lab.mistakes import require

_CHUNK = 64
_RECORD = struct.Struct("<IQ")


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how."""

    data_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA_DIR")]
    """Folder with train/ and val/, or the official archives; with --verify, packs."""
    out_dir: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT_DIR]", help_behavior_hint="")
    ] = None
    """Folder for train.pack and val.pack."""
    side: int = 400
    """Short side in pixels; 0: keep the files unchanged."""
    quality: int = 90
    """Quality of re-encoded JPEGs."""
    workers: int = field(default_factory=cores)
    """Processes that decode and encode; default: all cores."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which splits to pack."""
    verify: bool = False
    """Verify the hash of every image of the packs in DATA_DIR instead of packing."""


def shrunk(content: bytes | memoryview, name: str, side: int, quality: int | None, decoder: Decoder) -> bytes:
    """An image as stored in the pack.

    With ``side`` 0 its bytes are unchanged, but it is decoded once to detect broken files now. Otherwise its short side
    is reduced to ``side`` (antialiased, bicubic; smaller images keep their size) and it is encoded as JPEG of that
    quality with 4:2:0 chroma; if nothing was resized and that saves no bytes, the original bytes are kept.

    Raises:
        ValueError: the image cannot be decoded.
    """
    pixels = decoder(content, name)
    if side == 0 or quality is None:
        return bytes(content)
    image = Image.fromarray(pixels)
    factor = side / min(image.size)
    if factor < 1:
        width, height = (max(side, round(length * factor)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)
    made = file.getvalue()
    return made if factor < 1 or len(made) < len(content) else bytes(content)


def build_pack(options: PackOptions) -> Iterator[Path]:
    """Build the packs of the requested splits; yields each path once it is done and verified.

    Raises:
        ValueError: invalid options, missing or broken images, or an unfinished build with other settings.
    """
    data_dir, out_dir = options.data_dir, options.out_dir
    if out_dir is None:
        raise ValueError("OUT_DIR is missing; allowed: a folder for the packs")
    require(options.side == 0 or options.side >= 32, "side", options.side, "0, or at least 32")
    require(1 <= options.quality <= 100, "quality", options.quality, "1 to 100")
    require(options.workers >= 1, "workers", options.workers, "a whole number of at least 1")
    classes: tuple[str, ...] | None = None
    for split in options.splits:
        if classes is None and split == "val":
            classes = open_split(data_dir, "train").classes
        photos = open_split(data_dir, split, classes)
        classes = photos.classes
        path = out_dir / f"{split}.pack"
        about = {
            "classes": list(photos.classes),
            "side": options.side,
            "quality": options.quality if options.side else None,
            "made_from": photos.fingerprint(),
        }
        if path.exists():
            if open_pack(path).about != about | {"images": len(photos.labels)}:
                raise ValueError(f"{path} was made with other settings or images; remove it to rebuild it")
        else:
            out_dir.mkdir(parents=True, exist_ok=True)
            _build(photos, path, about, options.workers)
        yield path


def _build(photos: Photos, path: Path, about: dict[str, Any], workers: int) -> None:
    begun = Begun.open(path, about)
    count = len(photos.labels)
    rest = [range(i, min(i + _CHUNK, count)) for i in range(len(begun.sizes), count, _CHUNK)]
    bar = tqdm(total=count, initial=len(begun.sizes), desc=path.name, unit="image", disable=None)
    try:
        with bar, _pool(photos, about, workers) as pool:
            for made in _in_order(pool, rest, ahead=4 * workers):
                begun.append(made)
                bar.update(len(made))
    finally:
        begun.flush()
    finish(begun.part, begun.sizes, photos.labels, begun.hashes, about)
    open_pack(begun.part).verify()
    with begun.part.open("rb") as file:
        os.fsync(file.fileno())
    begun.part.rename(path)
    begun.log.unlink()


@dataclass
class Begun:
    """An unfinished pack."""

    part: Path
    log: Path
    sizes: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    @staticmethod
    def open(path: Path, about: dict[str, Any]) -> "Begun":
        """Continue an unfinished build, verifying its images, or start one.

        Raises:
            ValueError: it was started with other settings or images.
        """
        begun = Begun(path.with_name(path.name + ".part"), path.with_name(path.name + ".part-log"))
        settings = json.dumps(about).encode() + b"\n"
        logged = begun.log.read_bytes() if begun.log.exists() else b""
        if begun.part.exists() and b"\n" in logged:
            if not logged.startswith(settings):
                raise ValueError(
                    f"{begun.part} was started with other settings or images; remove it to start over"
                )
            begun._keep_what_fits(logged[len(settings) :])
            records = len(begun.sizes) * _RECORD.size
            os.truncate(begun.log, len(settings) + records)
        else:
            begun.part.write_bytes(HEAD)
            begun.log.write_bytes(settings)
        return begun

    def _keep_what_fits(self, records: bytes) -> None:
        whole = len(records) - len(records) % _RECORD.size
        with self.part.open("rb+") as file:
            if file.read(len(HEAD)) != HEAD:
                file.seek(0)
                file.write(HEAD)
                whole = 0
            end = len(HEAD)
            for size, digest in _RECORD.iter_unpack(records[:whole]):
                content = file.read(size)
                if len(content) < size or hash_of(content) != digest:
                    break
                self.sizes.append(size)
                self.hashes.append(digest)
                end += size
            file.truncate(end)

    def append(self, images: list[bytes]) -> None:
        hashes = [hash_of(image) for image in images]
        with self.part.open("ab") as file:
            file.write(b"".join(images))
        with self.log.open("ab") as file:
            file.write(b"".join(_RECORD.pack(len(i), h) for i, h in zip(images, hashes, strict=True)))
        self.sizes += map(len, images)
        self.hashes += hashes

    def flush(self) -> None:
        for path in (self.part, self.log):
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _pool(photos: Photos, about: dict[str, Any], workers: int) -> ProcessPoolExecutor:
    # Fork, so that the set's lists are shared instead of sent.
    return ProcessPoolExecutor(workers, WorkerContext(), _begin_work, (photos, about))


_work: dict[str, Any] = {}


def _begin_work(photos: Photos, about: dict[str, Any]) -> None:
    leave_signals_to_the_parent()
    _work.update(photos=photos, side=about["side"], quality=about["quality"], decoder=Decoder())


def _make(chunk: range) -> list[bytes]:
    photos, decoder = _work["photos"], _work["decoder"]
    return [shrunk(photos.read(i), photos.name(i), _work["side"], _work["quality"], decoder) for i in chunk]


def _in_order(pool: ProcessPoolExecutor, chunks: list[range], ahead: int) -> Iterator[list[bytes]]:
    """Results in chunk order, with at most ``ahead`` in flight, so that memory stays bounded."""
    under_way: deque[Future[list[bytes]]] = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_make, chunk))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
