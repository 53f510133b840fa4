"""ImageNet's photographs on disk: class folders, or the official archives, read in place.

A class is a WordNet id such as n01440764; labels are positions in the sorted list of the training set's ids,
as is usual. Nothing here imports torch.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from conadv_lab.data.decode import Content

Numbers = np.ndarray[Any, np.dtype[np.int64]]

TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


class Photos(Protocol):
    """Compressed images in a fixed order.

    Attributes:
        classes: the class names; a label is an index into it.
        labels: (N,) int64.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Numbers: ...

    def read(self, index: int) -> Content:
        """The bytes of an image file."""

    def name(self, index: int) -> str:
        """The image's name, for messages."""

    def fingerprint(self) -> str:
        """Identifies the set without reading its images."""


@dataclass(frozen=True)
class FolderPhotos:
    """A folder with one subfolder per class: ``root/<class>/<image>``."""

    root: Path
    classes: tuple[str, ...]
    labels: Numbers
    files: np.ndarray  # (N,) of bytes: a fifth of the memory of str objects

    def read(self, index: int) -> bytes:
        path = self.root / self.name(index)
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None

    def name(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{os.fsdecode(bytes(self.files[index]))}"

    def fingerprint(self) -> str:
        """From names and labels; does not read the files."""
        return _fingerprint(self.classes, self.labels, self.files.tobytes())


@dataclass(frozen=True)
class TarPhotos:
    """Images inside uncompressed archives, each a byte range of one of them."""

    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: Numbers
    archives: Numbers  # (N,) indices into paths
    offsets: Numbers
    sizes: Numbers
    names: np.ndarray  # (N,) of bytes

    def read(self, index: int) -> bytes:
        path, size = self.paths[self.archives[index]], int(self.sizes[index])
        try:
            content = os.pread(_open_file(path).fileno(), size, int(self.offsets[index]))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if len(content) != size:
            raise ValueError(f"{path} ends within {self.name(index)}: the archive is truncated")
        return content

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.names[index]))

    def fingerprint(self) -> str:
        """From names, labels and positions in the archives; does not read the images."""
        places = self.archives.tobytes() + self.offsets.tobytes()
        return _fingerprint(self.classes, self.labels, self.names.tobytes(), places)


@lru_cache(maxsize=256)  # there may be more shards than a process may open files
def _open_file(path: Path) -> FileIO:
    return FileIO(path)


def _fingerprint(classes: Sequence[str], labels: Numbers, *more: bytes) -> str:
    digest = sha256("\n".join(classes).encode())
    for part in (labels.tobytes(), *more):
        digest.update(part)
    return f"{len(labels)} images, sha256 {digest.hexdigest()[:16]}"


def open_photos(data_dir: str | Path, split: str, classes: tuple[str, ...] | None = None) -> Photos:
    """The images of a split: class folders, or else WebDataset shards, or else the official archive.

    Args:
        data_dir: has ``train`` and ``val``, or ``train-000000.tar`` … and ``val-000000.tar`` …, or
            ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and, for the latter's labels,
            ``ILSVRC2012_devkit_t12.tar.gz``.
        split: "train" or "val".
        classes: the training set's classes, to which the labels of "val" refer.

    Raises:
        ValueError: nothing found, or malformed data.
    """
    root = Path(data_dir)
    if (root / split).is_dir():
        return folder_photos(root / split, classes)
    shards = sorted(root.glob(f"{split}-*.tar"))
    if shards:
        return shard_photos(shards, classes)
    archive = root / (TRAIN_ARCHIVE if split == "train" else VAL_ARCHIVE)
    if not archive.is_file():
        raise ValueError(
            f"no ImageNet {split} images in {root.resolve()}; looked for {split}.pack, "
            f"{split}/<class>/<image>, {split}-….tar and {archive.name}"
        )
    if split == "train":
        return train_archive(archive)
    return val_archive(archive, root / DEVKIT, classes)


def folder_photos(root: Path, classes: tuple[str, ...] | None = None) -> FolderPhotos:
    """The images of ``root/<class>/<image>``, classes and files in sorted order; hidden files are ignored.

    Raises:
        ValueError: no class folders, an empty one, one that is not in ``classes``, or a file that is not an image.
    """
    entries = [entry for entry in _sorted(root) if not entry.name.startswith(".")]
    found = [entry.name for entry in entries if entry.is_dir()]
    if not found or len(found) < len(entries):
        stray = next((entry.name for entry in entries if not entry.is_dir()), None)
        raise ValueError(
            f"{root} contains {f'the file {stray}' if stray else 'no folders'}; allowed: one folder per class"
        )
    names = classes or tuple(found)
    places = {name: place for place, name in enumerate(names)}
    files: list[bytes] = []
    labels: list[int] = []
    for name in found:
        if name not in places:
            raise ValueError(f"{root / name} is a class that the training set does not have")
        inside = [entry.name for entry in _sorted(root / name) if not entry.name.startswith(".")]
        for file in inside:
            if not file.lower().endswith(ENDINGS):
                raise ValueError(f"{root / name / file} is not an image file; allowed: {', '.join(ENDINGS)}")
        if not inside:
            raise ValueError(f"{root / name} contains no images")
        files += map(os.fsencode, inside)
        labels += [places[name]] * len(inside)
    return FolderPhotos(root, names, np.array(labels, np.int64), np.array(files))


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def train_archive(path: Path) -> TarPhotos:
    """``ILSVRC2012_img_train.tar``, with one inner archive per class. Finding the images scans the whole file.

    Raises:
        ValueError: another layout, or a truncated archive.
    """
    rows: list[tuple[str, str, int, int]] = []
    with _opened(path) as outer:
        for member in tqdm(outer, desc=path.name, unit="class", disable=None, leave=False):
            if not member.isfile() or not member.name.endswith(".tar"):
                raise ValueError(f"{path} contains {member.name}; allowed: one archive per class, n….tar")
            wnid = Path(member.name).stem
            inner = outer.extractfile(member)
            with tarfile.open(fileobj=inner, mode="r:") as images:
                for image in images:
                    rows.append((wnid, image.name, member.offset_data + image.offset_data, image.size))
    classes = tuple(sorted({wnid for wnid, *_ in rows}))
    places = {name: place for place, name in enumerate(classes)}
    return _tar_photos([path], classes, sorted((places[row[0]], *row[1:], 0) for row in rows))


def val_archive(path: Path, devkit: Path, classes: tuple[str, ...] | None = None) -> TarPhotos:
    """``ILSVRC2012_img_val.tar``: bare images; their classes are in the development kit.

    Raises:
        ValueError: no development kit, or one that does not match.
    """
    if not devkit.is_file():
        raise ValueError(
            f"{path.name} has no class labels: put {devkit.name} beside it, "
            "or sort the images into val/<class>/"
        )
    wnids = val_classes(devkit)
    names = classes or tuple(sorted(set(wnids)))
    places = {name: place for place, name in enumerate(names)}
    with _opened(path) as archive:
        members = sorted(
            (member for member in archive if member.isfile()), key=lambda member: Path(member.name).name
        )
    if len(members) != len(wnids):
        raise ValueError(
            f"{path} contains {len(members)} images, but {devkit.name} has labels for {len(wnids)}"
        )
    missing = sorted(set(wnids) - set(places))
    if missing:
        raise ValueError(f"{devkit.name} names {missing[0]}, a class that the training set does not have")
    rows = [
        (places[wnid], member.name, member.offset_data, member.size, 0)
        for wnid, member in zip(wnids, members, strict=True)
    ]
    return _tar_photos([path], names, rows)


def shard_photos(paths: Sequence[Path], classes: tuple[str, ...] | None = None) -> TarPhotos:
    """WebDataset shards: each sample is an image, such as ``KEY.jpg``, and its class number in ``KEY.cls``.

    They are read in place and in any order, without the WebDataset library. Classes are named by their numbers.

    Raises:
        ValueError: an image without a class or vice versa, a class that is not a number, or a truncated shard.
    """
    rows: list[tuple[int, str, int, int, int]] = []
    for number, path in enumerate(tqdm(paths, desc="shards", disable=None, leave=False)):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        with _opened(path) as archive:
            for member in archive:
                key, _, ending = member.name.rpartition(".")
                if "." + ending.lower() in ENDINGS:
                    images[key] = member
                elif ending == "cls":
                    labels[key] = _number(archive.extractfile(member).read(), member.name, path)  # type: ignore[union-attr]
        alone = images.keys() ^ labels.keys()
        if alone:
            key = min(alone)
            raise ValueError(f"{path} has {'no class' if key in images else 'no image'} for {key}")
        rows += [(labels[k], m.name, m.offset_data, m.size, number) for k, m in images.items()]
    count = max((label for label, *_ in rows), default=-1) + 1
    if classes is not None and count > len(classes):
        raise ValueError(
            f"{paths[0]} … contain class {count - 1}; the training set has {len(classes)} classes"
        )
    names = classes or tuple(map(str, range(count)))
    return _tar_photos(paths, names, rows)


def _number(content: bytes, name: str, path: Path) -> int:
    if not content.strip().isdigit():
        raise ValueError(f"{name} in {path} contains {content[:20]!r}; allowed: a class number")
    return int(content)


def val_classes(devkit: Path) -> list[str]:
    """The class of each validation image, in name order, from the development kit.

    The kit numbers classes in its own order (``ILSVRC2012_ID``); ``meta.mat`` maps each number to a WordNet id. The
    leaves of the hierarchy (without children) are the classes.

    Raises:
        ValueError: the file is not the development kit.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    try:
        with tarfile.open(devkit) as kit:
            for member in kit:
                base = member.name.rpartition("/")[2]
                if base in wanted and member.isfile():
                    wanted[base] = kit.extractfile(member).read()  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        truth = wanted["ILSVRC2012_validation_ground_truth.txt"].split()
        if not truth:
            raise KeyError("ILSVRC2012_validation_ground_truth.txt")
        return [wnid_of[int(number)] for number in truth]
    except (MatReadError, tarfile.TarError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or ["broken"])[0].rstrip(":")
        raise ValueError(f"{devkit} is not ImageNet's development kit: {reason}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar archive, or is truncated: {error}") from None


def _tar_photos(
    paths: Sequence[Path], classes: tuple[str, ...], rows: list[tuple[int, str, int, int, int]]
) -> TarPhotos:
    if not rows:
        raise ValueError(f"{paths[0]} contains no images")
    labels, names, offsets, sizes, archives = zip(*rows, strict=True)
    numbers = {"labels": labels, "offsets": offsets, "sizes": sizes, "archives": archives}
    arrays = {name: np.array(values, np.int64) for name, values in numbers.items()}
    return TarPhotos(tuple(paths), classes, names=np.array([os.fsencode(name) for name in names]), **arrays)
