"""A pack: all photographs of a split in one memory-mapped file, with their labels and hashes.

Layout of ``train.pack``, all numbers little-endian:

    head      16 bytes, ``CONADV PACK 1`` and zeros
    images    one file after another
    table     N + 1 offsets int64, N labels int32, N hashes uint64 (BLAKE2b of 8 bytes)
    about     JSON: classes, side, quality, images
    tail      offset of the table int64, offset of the JSON int64, SHA-256 of table and JSON, ``CONADV PACK END``

Nothing in it is unpickled. Images keep their bytes (``--side 0``) or are reduced by
`conadv_lab.data.pack_build.shrunk`.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conadv_lab.data.imagenet_files import Numbers, Photos, open_photos

HEAD = b"CONADV PACK 1".ljust(16, b"\0")
_TAIL = struct.Struct("<qq32s15s")
_END = b"CONADV PACK END"


@dataclass(frozen=True)
class Pack:
    """A finished pack, memory-mapped: all processes on a machine share its pages.

    Attributes:
        path: its file.
        classes: the class names; a label is an index into them.
        offsets: (N + 1,) int64, where each image starts and the last one ends.
        labels: (N,) int64.
        hashes: (N,) uint64.
        about: the settings it was made with.
        sha256: of table and JSON, and thereby, through the hashes, of everything.
    """

    path: Path
    classes: tuple[str, ...]
    offsets: Numbers
    labels: Numbers
    hashes: np.ndarray
    about: dict[str, Any]
    sha256: str

    @cached_property
    def _memory(self) -> memoryview:
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self, index: int) -> memoryview:
        return self._memory[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def fingerprint(self) -> str:
        """Covers every image, label and class."""
        return f"{len(self.labels)} images, sha256 {self.sha256[:16]}"

    def verify(self) -> None:
        """Check the hash of every image.

        Raises:
            ValueError: an image is damaged.
        """
        for index in tqdm(range(len(self.labels)), desc=self.path.name, unit="image", disable=None):
            if hash_of(self.read(index)) != int(self.hashes[index]):
                raise ValueError(f"{self.name(index)} is damaged: its hash does not match; rebuild the pack")


def open_pack(path: Path, classes: tuple[str, ...] | None = None) -> Pack:
    """Open a finished pack.

    Args:
        path: its file.
        classes: the training set's classes, which the pack must have.

    Raises:
        ValueError: not a pack, or unfinished, damaged or with other classes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(HEAD)) != HEAD:
            raise ValueError(
                f"{path} is not a pack of this version; make one with python -m conadv_lab.data.pack"
            )
        file.seek(max(0, size - _TAIL.size))
        tail = file.read()
        if not tail.endswith(_END):
            raise ValueError(f"{path} is truncated; rebuild the pack")
        table, about, digest, _ = _TAIL.unpack(tail)
        file.seek(table)
        content = file.read(size - _TAIL.size - table)
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: the hash of its table does not match; rebuild the pack")
    described = json.loads(content[about - table :])
    count = described["images"]
    offsets = np.frombuffer(content, "<i8", count + 1)
    labels = np.frombuffer(content, "<i4", count, offset=8 * (count + 1)).astype(np.int64)
    hashes = np.frombuffer(content, "<u8", count, offset=8 * (count + 1) + 4 * count)
    own = tuple(described["classes"])
    if classes is not None and own != classes:
        raise ValueError(
            f"{path} has {len(own)} classes, which differ from the training set's {len(classes)}"
        )
    return Pack(path, own, offsets, labels, hashes, described, digest.hex())


def hash_of(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def finish(path: Path, sizes: Sequence[int], labels: Numbers, hashes: Sequence[int], about: dict) -> None:
    """Append table, JSON and tail to a file that has head and images."""
    offsets = len(HEAD) + np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    table = offsets.astype("<i8").tobytes() + labels.astype("<i4").tobytes()
    table += np.array(hashes, "<u8").tobytes()
    described = json.dumps(about | {"images": len(labels)}).encode()
    digest = hashlib.sha256(table + described).digest()
    start = int(offsets[-1])
    with path.open("ab") as file:
        file.write(table + described + _TAIL.pack(start, start + len(table), digest, _END))


def open_split(data_dir: str | Path, split: str, classes: tuple[str, ...] | None = None) -> Photos:
    """The images of "train" or "val": from a pack, or else what `open_photos` finds.

    Raises:
        ValueError: nothing found, or a broken pack.
    """
    path = Path(data_dir) / f"{split}.pack"
    return open_pack(path, classes) if path.is_file() else open_photos(data_dir, split, classes)
