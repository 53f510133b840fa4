"""Folders and tiny archives in the official layouts: what is found, and what is refused in one sentence."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from conadv_lab.data.imagenet_files import DEVKIT, TRAIN_ARCHIVE, VAL_ARCHIVE, open_photos
from tests.data.photos import encoded, photo

WNIDS = ["n01440764", "n01443537", "n02105855"]
# The kit numbers classes in another order than the ids' and has inner nodes of the hierarchy too.
KIT_NUMBERS = {"n02105855": 1, "n01440764": 2, "n01443537": 3}
TRUTH = [2, 3, 1, 1]


def write_folders(root: Path, split: str, counts: dict[str, int]) -> dict[str, bytes]:
    """Class folders of small images; their contents by name."""
    contents = {}
    for wnid, count in counts.items():
        (root / split / wnid).mkdir(parents=True)
        for i in range(count):
            name = f"{wnid}_{i}.JPEG"
            contents[name] = encoded(photo(24 + i, 20, seed=len(contents)))
            (root / split / wnid / name).write_bytes(contents[name])
    return contents


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_train_archive(root: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(root / TRAIN_ARCHIVE, "w") as outer:
        for wnid in reversed(WNIDS):  # the order within the archive does not matter
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for name in contents:
                    if name.startswith(wnid):
                        add(archive, name, contents[name])
            add(outer, f"{wnid}.tar", inner.getvalue())


def write_val_archive(root: Path, count: int = len(TRUTH)) -> list[bytes]:
    images = [encoded(photo(30, 20 + i, seed=50 + i)) for i in range(count)]
    with tarfile.open(root / VAL_ARCHIVE, "w") as archive:
        for i in reversed(range(count)):
            add(archive, f"ILSVRC2012_val_{i + 1:08d}.JPEG", images[i])
    return images


def write_devkit(root: Path, truth: list[int] = TRUTH) -> None:
    fields = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(number, wnid, "a fish", 0) for wnid, number in KIT_NUMBERS.items()]
    synsets = np.array([*rows, (4, "n00001740", "entity", 3)], dtype=fields).reshape(-1, 1)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    with tarfile.open(root / DEVKIT, "w:gz") as kit:
        add(kit, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        text = "".join(f"{number}\n" for number in truth).encode()
        add(kit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text)


def listed(photos) -> list[tuple[str, str, bytes]]:
    return [
        (Path(photos.name(i)).name, photos.classes[photos.labels[i]], bytes(photos.read(i)))
        for i in range(len(photos.labels))
    ]


def test_folders_are_read_in_sorted_order(tmp_path):
    contents = write_folders(tmp_path, "train", {WNIDS[1]: 3, WNIDS[0]: 2})
    (tmp_path / "train" / ".DS_Store").write_bytes(b"")
    (tmp_path / "train" / WNIDS[0] / "._hidden.JPEG").write_bytes(b"")
    photos = open_photos(tmp_path, "train")
    assert photos.classes == (WNIDS[0], WNIDS[1])
    assert listed(photos) == [(name, name[:9], contents[name]) for name in sorted(contents)]
    assert photos.labels.tolist() == [0, 0, 1, 1, 1]


def test_validation_labels_are_the_training_sets(tmp_path):
    write_folders(tmp_path, "val", {WNIDS[2]: 2})
    assert open_photos(tmp_path, "val", tuple(WNIDS)).labels.tolist() == [2, 2]
    with pytest.raises(ValueError, match="n02105855 is a class that the training set does not have"):
        open_photos(tmp_path, "val", (WNIDS[0],))


def test_the_archives_hold_what_the_folders_hold(tmp_path):
    contents = write_folders(tmp_path, "train", dict.fromkeys(WNIDS, 2))
    folders = open_photos(tmp_path, "train")
    (tmp_path / "archives").mkdir()
    write_train_archive(tmp_path / "archives", contents)
    archive = open_photos(tmp_path / "archives", "train")
    assert listed(archive) == listed(folders)
    assert archive.classes == folders.classes == tuple(WNIDS)
    assert archive.fingerprint() != folders.fingerprint()


def test_the_kit_says_which_class_a_validation_image_is_of(tmp_path):
    images = write_val_archive(tmp_path)
    write_devkit(tmp_path)
    val = open_photos(tmp_path, "val", tuple(WNIDS))
    expected = ["n01440764", "n01443537", "n02105855", "n02105855"]
    assert [(wnid, content) for _, wnid, content in listed(val)] == list(zip(expected, images, strict=True))
    assert val.labels.tolist() == [0, 1, 2, 2]


def write_shards(
    root: Path, split: str, samples: list[tuple[str, bytes, bytes | None]], shards: int = 2
) -> None:
    for number in range(shards):
        with tarfile.open(root / f"{split}-{number:06d}.tar", "w") as archive:
            for key, image, label in samples[number::shards]:
                add(archive, f"{key}.jpg", image)
                add(archive, f"{key}.json", b"{}")
                if label is not None:
                    add(archive, f"{key}.cls", label)


def test_shards_are_read_in_place(tmp_path):
    images = [encoded(photo(30, 20 + i, seed=i)) for i in range(5)]
    write_shards(
        tmp_path, "train", [(f"{i:04d}", image, b"%d\n" % (i % 3)) for i, image in enumerate(images)]
    )
    photos = open_photos(tmp_path, "train")
    assert photos.classes == ("0", "1", "2")
    order = [0, 2, 4, 1, 3]
    assert listed(photos) == [(f"{i:04d}.jpg", str(i % 3), images[i]) for i in order]
    write_shards(tmp_path, "val", [("a", images[0], b"2")], shards=1)
    assert open_photos(tmp_path, "val", photos.classes).labels.tolist() == [2]
    with pytest.raises(ValueError, match="contain class 2; the training set has 2 classes"):
        open_photos(tmp_path, "val", ("0", "1"))


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "has no class for a"), (b"fish", r"a\.cls in .* contains b'fish'; allowed: a class number")],
)
def test_broken_shards(tmp_path, label, message):
    write_shards(tmp_path, "train", [("a", encoded(photo(20, 20)), label)], shards=1)
    refused(tmp_path, "train", message)


def refused(tmp_path: Path, split: str, message: str, classes: tuple[str, ...] | None = None) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_photos(tmp_path, split, classes)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    refused(tmp_path, "train", r"no ImageNet train images in .*train\.pack.*ILSVRC2012_img_train\.tar")
    (tmp_path / "train").mkdir()
    refused(tmp_path, "train", "train contains no folders; allowed: one folder per class")


def test_an_empty_class_a_stray_file_and_flat_images(tmp_path):
    write_folders(tmp_path, "train", {WNIDS[0]: 1})
    (tmp_path / "train" / WNIDS[1]).mkdir()
    refused(tmp_path, "train", "n01443537 contains no images")
    (tmp_path / "train" / WNIDS[1] / "notes.txt").write_text("")
    refused(tmp_path, "train", r"notes\.txt is not an image file")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    refused(
        tmp_path, "val", r"contains the file ILSVRC2012_val_00000001\.JPEG; allowed: one folder per class"
    )


def test_a_validation_archive_without_its_kit_or_with_another(tmp_path):
    write_val_archive(tmp_path)
    refused(tmp_path, "val", r"has no class labels.*put ILSVRC2012_devkit_t12\.tar\.gz beside it")
    write_devkit(tmp_path, TRUTH[:3])
    refused(tmp_path, "val", r"contains 4 images, but ILSVRC2012_devkit_t12\.tar\.gz has labels for 3")
    write_devkit(tmp_path)
    refused(tmp_path, "val", "names n02105855, a class that the training set", (WNIDS[0], WNIDS[1]))
    (tmp_path / DEVKIT).write_bytes(b"<html>404</html>")
    refused(tmp_path, "val", "is not ImageNet's development kit")
    with tarfile.open(tmp_path / DEVKIT, "w:gz") as kit:
        add(kit, "readme.txt", b"hello")
    refused(tmp_path, "val", "is not ImageNet's development kit")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_truncated_archive(tmp_path, share):
    contents = {f"{wnid}_{i}.JPEG": encoded(photo(60, 60, i)) for wnid in WNIDS for i in range(3)}
    write_train_archive(tmp_path, contents)
    path = tmp_path / TRAIN_ARCHIVE
    os.truncate(path, int(share * path.stat().st_size))
    refused(tmp_path, "train", r"img_train\.tar is not an uncompressed tar archive, or is truncated")


def test_an_archive_of_something_else(tmp_path):
    with tarfile.open(tmp_path / TRAIN_ARCHIVE, "w") as archive:
        add(archive, "holiday.jpg", b"")
    refused(tmp_path, "train", r"contains holiday\.jpg; allowed: one archive per class")
    with tarfile.open(tmp_path / TRAIN_ARCHIVE, "w"):
        pass
    refused(tmp_path, "train", "contains no images")


def test_a_file_that_vanished_is_named(tmp_path):
    write_folders(tmp_path, "train", {WNIDS[0]: 1})
    photos = open_photos(tmp_path, "train")
    (tmp_path / "train" / WNIDS[0] / "n01440764_0.JPEG").unlink()
    with pytest.raises(ValueError, match=r"n01440764_0\.JPEG cannot be read: No such file"):
        photos.read(0)
