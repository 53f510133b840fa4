"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official archives, Python or binary version."""

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conadv_lab.data.download import download_file
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.sets import TensorSet
from conadv_lab.mistakes import unknown

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """One official archive: its location, contents and format.

    Attributes:
        url: where to download it.
        md5: of the .tar.gz, from the official page.
        folder: the folder it unpacks to.
        train: its training files, in order.
        test: its test file.
        images: number of images per training file.
        classes: number of classes.
        labels: the labels' key in the Python version; None for the binary version.
        label_bytes: label bytes before each image in the binary version; the last one is the label.
        test_images: number of images in the test file.
    """

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    images: int
    classes: int
    labels: str | None = None
    label_bytes: int = 0
    test_images: int = 10_000

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


_HOME = "https://www.cs.toronto.edu/~kriz/"
_SETS: dict[str, tuple[Archive, Archive]] = {
    "cifar10": (
        Archive(
            url=_HOME + "cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            images=10_000,
            classes=10,
            labels="labels",
        ),
        Archive(
            url=_HOME + "cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test="test_batch.bin",
            images=10_000,
            classes=10,
            label_bytes=1,
        ),
    ),
    "cifar100": (
        Archive(
            url=_HOME + "cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train=("train",),
            test="test",
            images=50_000,
            classes=100,
            labels="fine_labels",
        ),
        Archive(
            url=_HOME + "cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train=("train.bin",),
            test="test.bin",
            images=50_000,
            classes=100,
            label_bytes=2,
        ),
    ),
}


def load_cifar(
    root: str | Path, name: str = "cifar10", download: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CIFAR as tensors, from files in a folder or from the official page.

    Looks in ``root`` for an unpacked folder (``cifar-10-batches-py``, ``cifar-10-batches-bin``,
    ``cifar-100-python``, ``cifar-100-binary``), then for the .tar.gz. An archive is checked against the official
    MD5 and read in place: nothing is unpacked to disk. Files in an unpacked folder are only checked for their
    shape. Pickles may refer to numpy's array constructors and nothing else.

    Args:
        root: the folder with the unpacked folder or the archive.
        name: "cifar10" or "cifar100" (with its 100 fine labels).
        download: if nothing is found, download the Python version (about 170 MB) to ``root``.

    Returns:
        train images (50000, 3, 32, 32) uint8, train labels (50000,) int64, test images (10000, 3, 32, 32)
        uint8, test labels (10000,) int64, in the official order.

    Raises:
        ValueError: an unknown name; nothing found; a file or archive that is missing, truncated, altered or of the
            wrong shape; a failed download, which leaves nothing behind.
    """
    if name not in _SETS:
        raise unknown("CIFAR data set", name, _SETS)
    root = Path(root)
    if not download:
        require_archive(root, name)
    for archive in _SETS[name]:
        if (root / archive.folder).is_dir():
            return _assemble(archive, _from_folder(archive, root / archive.folder))
    for archive in _SETS[name]:
        if (root / archive.file).is_file():
            return _assemble(archive, _from_tar(archive, root / archive.file))
    archive = _SETS[name][0]
    download_file(archive.url, root / archive.file, archive.md5)
    return _assemble(archive, _from_tar(archive, root / archive.file))


def cifar_sets(section: Data, demand: Demand, device: torch.device) -> tuple[TensorSet, TensorSet]:
    images, labels, test_images, test_labels = load_cifar(
        section.data_dir, section.dataset, download=section.download
    )
    classes = _SETS[section.dataset][0].classes
    return TensorSet(images, labels, classes), TensorSet(test_images, test_labels, classes)


def require_archive(root: str | Path, name: str = "cifar10") -> None:
    """Raise ``ValueError`` unless ``root`` has a file or folder that `load_cifar` would read; does not open it."""
    places = [place for archive in _SETS[name] for place in (archive.folder, archive.file)]
    if not any((Path(root) / place).exists() for place in places):
        raise ValueError(f"no {name} in {root}: put {' or '.join(places)} there, or pass --download")


def _from_folder(archive: Archive, folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in (*archive.train, archive.test):
        try:
            yield name, (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error


def _from_tar(archive: Archive, path: Path) -> Iterator[tuple[str, bytes]]:
    """The wanted members, matched by exact name and read into memory: no member's path touches the disk."""
    wanted = {f"{archive.folder}/{name}": name for name in (*archive.train, archive.test)}
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != archive.md5:
            size = f"{path.stat().st_size:,} bytes"
            official = f"its MD5 is {found}, the official one {archive.md5}"
            raise ValueError(f"{path} ({size}) is truncated or altered: {official}")
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name in wanted and member.isreg() else None
                if content is not None:
                    yield wanted.pop(member.name), content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a .tar.gz: {error}") from error
    if wanted:
        raise ValueError(f"{path} lacks {', '.join(sorted(wanted))}")


def _assemble(archive: Archive, files: Iterator[tuple[str, bytes]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = len(archive.train) * archive.images
    images = torch.empty(total + archive.test_images, 3, 32, 32, dtype=torch.uint8, device="cpu")
    labels = torch.empty(total + archive.test_images, dtype=torch.int64, device="cpu")
    for name, content in files:
        count = archive.test_images if name == archive.test else archive.images
        start = total if name == archive.test else archive.train.index(name) * archive.images
        try:
            parse = _parse_pickle if archive.labels else _parse_binary
            pixels, classes = parse(archive, content, count)
        except ValueError as error:
            raise ValueError(f"{name} of {archive.folder} {error}") from error
        if classes.min() < 0 or classes.max() >= archive.classes:
            raise ValueError(f"{name} of {archive.folder} has labels outside 0 to {archive.classes - 1}")
        images[start : start + count] = torch.from_numpy(pixels).view(count, 3, 32, 32)
        labels[start : start + count] = torch.from_numpy(classes)
    return images[:total], labels[:total], images[total:], labels[total:]


def _parse_binary(archive: Archive, content: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of label bytes and 3072 pixel bytes, without a header."""
    record = archive.label_bytes + _PIXELS
    if len(content) != count * record:
        raise ValueError(
            f"has {len(content):,} bytes, not {count * record:,}: it is truncated or a different file"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(count, record)
    return records[:, archive.label_bytes :].copy(), records[:, archive.label_bytes - 1].astype(np.int64)


def _parse_pickle(archive: Archive, content: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"is not a readable CIFAR pickle: {error or type(error).__name__}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a dictionary")
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    pixels, labels = batch.get("data"), batch.get(archive.labels)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (count, _PIXELS)):
        shape = f"{pixels.dtype} of shape {pixels.shape}" if isinstance(pixels, np.ndarray) else "missing"
        raise ValueError(f"has the wrong shape: 'data' is {shape}, not uint8 of shape {(count, _PIXELS)}")
    if not (isinstance(labels, list) and len(labels) == count and all(type(x) is int for x in labels)):
        size = f"{len(labels)} entries" if isinstance(labels, list) else "missing"
        raise ValueError(f"has the wrong shape: {archive.labels!r} has {size}, not {count} whole numbers")
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its name differs between numpy versions


class _ArrayUnpickler(pickle.Unpickler):
    """Loads plain containers and numpy arrays; refuses any other name in the pickle without importing it."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")}
    )

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; the official files use the old name.
        if (module.replace("numpy._core", "numpy.core"), name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")
        return getattr(np, name) if module == "numpy" else _RECONSTRUCT
