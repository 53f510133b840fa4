"""CIFAR from tiny archives in the official layouts: what is read, and what is refused in one sentence."""

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from conadv_lab.data import cifar
from conadv_lab.data.cifar import load_cifar

IMAGES, TEST_IMAGES = 20, 10
KINDS = [("cifar10", 0), ("cifar10", 1), ("cifar100", 0), ("cifar100", 1)]


def contents(archive, count, seed):
    """Random pixels (count, 3072), labels and, for CIFAR-100, coarse labels that must not be taken."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, archive.classes, count), generator.integers(0, 20, count)


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2's ``str``, the way the official files have them."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}


def as_python_2_wrote(batch):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(batch)
    # numpy's constructor under the name that it had then, whichever numpy runs the tests
    return file.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


def encode(archive, pixels, labels, coarse):
    if archive.labels is None:
        columns = [coarse, labels] if archive.label_bytes == 2 else [labels]
        return np.hstack([*(column[:, None].astype(np.uint8) for column in columns), pixels]).tobytes()
    batch = {b"data": pixels, archive.labels.encode(): labels.tolist(), b"coarse_labels": coarse.tolist()}
    return as_python_2_wrote(batch)


@pytest.fixture
def small(monkeypatch):
    """Make both versions of both sets expect tiny files."""
    for name, archives in list(cifar._SETS.items()):
        tiny = [replace(archive, images=IMAGES, test_images=TEST_IMAGES) for archive in archives]
        monkeypatch.setitem(cifar._SETS, name, tuple(tiny))


def write_folder(root, name, version):
    """Write a tiny set; what load_cifar should return for it."""
    archive = cifar._SETS[name][version]
    (root / archive.folder).mkdir(parents=True)
    parts = []
    for seed, file in enumerate((*archive.train, archive.test)):
        parts.append(contents(archive, TEST_IMAGES if file == archive.test else IMAGES, seed))
        (root / archive.folder / file).write_bytes(encode(archive, *parts[-1]))
    images = [torch.from_numpy(part[0]).view(-1, 3, 32, 32) for part in parts]
    labels = [torch.from_numpy(part[1]) for part in parts]
    return torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1]


def pack(root, name, version, monkeypatch):
    """Turn the folder into its .tar.gz and expect that archive's MD5."""
    archive = cifar._SETS[name][version]
    path = root / archive.file
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / archive.folder, archive.folder)
    for file in (root / archive.folder).iterdir():
        file.unlink()
    (root / archive.folder).rmdir()
    trust(path, name, version, monkeypatch)
    return path


def trust(path, name, version, monkeypatch):
    archives = list(cifar._SETS[name])
    archives[version] = replace(archives[version], md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(cifar._SETS, name, tuple(archives))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def one_sentence(error):
    """The message, checked to be one line without a traceback in it."""
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "version"), KINDS)
def test_reads_a_folder(tmp_path, name, version):
    expected = write_folder(tmp_path, name, version)
    assert_same(load_cifar(tmp_path, name), expected)
    assert expected[0].shape == ((5 if name == "cifar10" else 1) * IMAGES, 3, 32, 32)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "version"), KINDS)
def test_reads_an_archive_in_place(tmp_path, monkeypatch, name, version):
    expected = write_folder(tmp_path, name, version)
    path = pack(tmp_path, name, version, monkeypatch)
    assert_same(load_cifar(str(tmp_path), name), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_official_shapes(tmp_path):
    """The official binary layout in full size, as sparse files of zeros."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))):
        with (folder / name).open("wb") as file:
            file.truncate(30_730_000)
    images, labels, test_images, test_labels = load_cifar(tmp_path)
    assert (images.shape, test_images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert (labels.shape, test_labels.shape) == ((50_000,), (10_000,))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


def test_nothing_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"^no cifar100 in .*cifar-100-python or cifar-100-python.tar.gz or"
    ) as e:
        load_cifar(tmp_path / "nowhere", "cifar100")
    assert "download" in one_sentence(e)
    assert list(tmp_path.iterdir()) == []


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"unknown CIFAR data set 'cifar-10'.*Did you mean 'cifar10'"):
        load_cifar(tmp_path, "cifar-10")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("version", [0, 1])
def test_file_missing_from_the_folder(tmp_path, version):
    write_folder(tmp_path, "cifar10", version)
    archive = cifar._SETS["cifar10"][version]
    (tmp_path / archive.folder / archive.train[2]).unlink()
    with pytest.raises(ValueError, match=f"{archive.train[2]} cannot be read: No such file") as error:
        load_cifar(tmp_path)
    one_sentence(error)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("version", "message"), [(0, "is not a readable CIFAR pickle"), (1, "bytes, not 61,460: it is truncated")]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_file_truncated(tmp_path, version, message, share):
    write_folder(tmp_path, "cifar10", version)
    archive = cifar._SETS["cifar10"][version]
    path = tmp_path / archive.folder / archive.train[1]
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=message) as error:
        load_cifar(tmp_path)
    assert archive.train[1] in one_sentence(error)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"data": np.zeros((IMAGES, 3071), np.uint8), "labels": [0] * IMAGES},
            r"uint8 of shape \(20, 3071\), not",
        ),
        (
            {"data": np.zeros((IMAGES - 1, 3072), np.uint8), "labels": [0] * IMAGES},
            r"shape \(19, 3072\), not",
        ),
        ({"data": np.zeros((IMAGES, 3072)), "labels": [0] * IMAGES}, "float64 of shape"),
        ({"data": [1, 2], "labels": [0] * IMAGES}, "'data' is missing"),
        ({"labels": [0] * IMAGES}, "'data' is missing"),
        ({"data": np.zeros((IMAGES, 3072), np.uint8)}, "'labels' has missing"),
        ({"data": np.zeros((IMAGES, 3072), np.uint8), "labels": [0] * 3}, "'labels' has 3 entries, not 20"),
        ({"data": np.zeros((IMAGES, 3072), np.uint8), "labels": [10] * IMAGES}, "labels outside 0 to 9"),
        ({"data": np.zeros((IMAGES, 3072), np.uint8), "labels": [-1] * IMAGES}, "labels outside 0 to 9"),
        ([1, 2, 3], "holds a list, not a dictionary"),
    ],
)
def test_wrong_shape_in_a_pickle(tmp_path, batch, message):
    write_folder(tmp_path, "cifar10", 0)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(as_python_2_wrote(batch))
    with pytest.raises(ValueError, match=message) as error:
        load_cifar(tmp_path)
    assert one_sentence(error).startswith("data_batch_1 of cifar-10-batches-py ")


@pytest.mark.usefixtures("small")
def test_reads_what_todays_numpy_writes(tmp_path):
    images, labels, _, _ = write_folder(tmp_path, "cifar10", 0)
    batch = {"data": images[:IMAGES].numpy().reshape(IMAGES, 3072), "labels": labels[:IMAGES].tolist()}
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=4))
    assert torch.equal(load_cifar(tmp_path)[0], images)


@pytest.mark.usefixtures("small")
def test_label_out_of_range_in_the_binary_version(tmp_path):
    write_folder(tmp_path, "cifar10", 1)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[3073] = 10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch.bin of cifar-10-batches-bin has labels outside 0 to 9"):
        load_cifar(tmp_path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_name_anything_else_run_nothing(tmp_path, protocol):
    write_folder(tmp_path, "cifar10", 0)
    victim = tmp_path / "made by the pickle"
    hostile = pickle.dumps({"data": Hostile(victim)}, protocol=protocol)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(hostile)
    with pytest.raises(ValueError, match=r"it refers to \w+.mkdir, which no CIFAR file does"):
        load_cifar(tmp_path)
    assert not victim.exists()
    pickle.loads(hostile)
    assert victim.exists(), "the pickle is not hostile, so the test shows nothing"


@pytest.mark.usefixtures("small")
def test_archive_with_another_checksum(tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar10", 0)
    path = pack(tmp_path, "cifar10", 0, monkeypatch)
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        ValueError, match=r"is truncated or altered: its MD5 is [0-9a-f]{32}, the official"
    ) as error:
        load_cifar(tmp_path)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_archive_cut_short_behind_a_right_checksum(tmp_path, monkeypatch, share):
    write_folder(tmp_path, "cifar10", 0)
    path = pack(tmp_path, "cifar10", 0, monkeypatch)
    os.truncate(path, int(share * path.stat().st_size))
    trust(path, "cifar10", 0, monkeypatch)
    with pytest.raises(ValueError, match=r"cannot be read as a .tar.gz") as error:
        load_cifar(tmp_path)
    one_sentence(error)


@pytest.mark.usefixtures("small")
def test_archive_without_a_file_or_with_a_link_in_its_place(tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar10", 0)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").symlink_to("data_batch_2")
    (folder / "test_batch").unlink()
    pack(tmp_path, "cifar10", 0, monkeypatch)
    with pytest.raises(
        ValueError, match=r"lacks cifar-10-batches-py/data_batch_3, cifar-10-batches-py/test_batch$"
    ):
        load_cifar(tmp_path)


@pytest.mark.usefixtures("small")
def test_archive_members_write_nothing_anywhere(tmp_path, monkeypatch):
    root = tmp_path / "inner"
    expected = write_folder(root, "cifar10", 0)
    archive = cifar._SETS["cifar10"][0]
    outside = root / archive.folder / "outside"
    outside.write_text("x")
    path = root / archive.file
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../outside", "/outside", f"{archive.folder}/../../outside"):
            tar.add(outside, name)
        tar.add(root / archive.folder, archive.folder)
    trust(path, "cifar10", 0, monkeypatch)
    (root / archive.folder).rename(tmp_path / "away")
    assert_same(load_cifar(root), expected)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["away", "inner"]
    assert list(root.iterdir()) == [path]
