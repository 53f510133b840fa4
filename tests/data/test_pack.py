"""Packs: what goes in comes out, a build can be killed at any moment, and damage is found."""

import errno
import io
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conadv_lab.data import pack_build
from conadv_lab.data.imagenet_files import open_photos
from conadv_lab.data.pack import main
from conadv_lab.data.pack_build import shrunk
from conadv_lab.data.pack_file import open_pack, open_split
from tests.data.photos import encoded, photo

WNIDS = ["n01440764", "n01443537"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree of 12 training and 4 validation images, some larger than 64 pixels, one grey, one a PNG."""
    for split, count in (("train", 6), ("val", 2)):
        for wnid in WNIDS:
            folder = tmp_path / "images" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                image = photo(40 + 20 * i, 90, seed=i)
                kind = "PNG" if i == 1 else "JPEG"
                (folder / f"{wnid}_{i}.JPEG").write_bytes(
                    encoded(image.convert("L") if i == 2 else image, kind)
                )
    return tmp_path / "images"


def build(tree: Path, out: Path, *words: str) -> int:
    return main([str(tree), str(out), "--workers", "1", *words])


def test_original_images_keep_their_bytes_order_and_labels(tree, tmp_path, capsys):
    assert build(tree, tmp_path / "packs", "--side", "0") == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "packs" / f"{s}.pack") for s in ("train", "val")
    ]
    for split in ("train", "val"):
        folder, packed = open_photos(tree, split), open_split(tmp_path / "packs", split)
        assert packed.classes == folder.classes
        np.testing.assert_array_equal(packed.labels, folder.labels)
        for i in range(len(folder.labels)):
            assert bytes(packed.read(i)) == folder.read(i)
    assert sorted(os.listdir(tmp_path / "packs")) == ["train.pack", "val.pack"]


def test_short_sides_come_down_and_small_images_keep_their_size(tree, tmp_path):
    assert build(tree, tmp_path / "packs", "--side", "64") == 0
    folder, packed = open_photos(tree, "train"), open_split(tmp_path / "packs", "train")
    for i in range(len(folder.labels)):
        before = Image.open(io.BytesIO(folder.read(i))).size
        after = Image.open(io.BytesIO(packed.read(i))).size
        assert min(after) == min(64, min(before))
        assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.01)
        assert len(packed.read(i)) <= len(folder.read(i)) or after != before


def test_shrunk_looks_as_pillow_shrinks_it():
    image = photo(200, 100)
    made = shrunk(encoded(image, "PNG"), "x", 50, 95, pack_build.Decoder())
    expected = image.resize((100, 50), Image.Resampling.BICUBIC)
    # brightness alone: 4:2:0 blurs colours as fast as these
    both = [np.asarray(one.convert("L")).astype(int) for one in (Image.open(io.BytesIO(made)), expected)]
    assert np.abs(both[0] - both[1]).mean() < 3


def test_workers_change_nothing(tree, tmp_path):
    build(tree, tmp_path / "one", "--side", "64")
    build(tree, tmp_path / "two", "--side", "64", "--workers", "2")
    assert (tmp_path / "one" / "train.pack").read_bytes() == (tmp_path / "two" / "train.pack").read_bytes()


@pytest.mark.parametrize("damage", ["none", "image", "part cut", "log cut", "head"])
def test_a_killed_build_goes_on_and_ends_as_if_never_killed(tree, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(pack_build, "_CHUNK", 2)
    build(tree, tmp_path / "whole", "--side", "64")
    append, calls = pack_build.Begun.append, []

    def dies(begun, images):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(images))
        append(begun, images)

    with monkeypatch.context() as patch:
        patch.setattr(pack_build.Begun, "append", dies)
        assert build(tree, tmp_path / "killed", "--side", "64") == 75
    part, log = (tmp_path / "killed" / f"train.pack.{end}" for end in ("part", "part-log"))
    assert sorted(os.listdir(tmp_path / "killed")) == ["train.pack.part", "train.pack.part-log"]
    if damage == "image":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "head":
        part.write_bytes(b"x" + part.read_bytes()[1:])
    elif damage != "none":
        path = part if damage == "part cut" else log
        os.truncate(path, path.stat().st_size - 7)
    made = []
    make = pack_build.Begun.append
    monkeypatch.setattr(pack_build.Begun, "append", lambda *a: (made.append(len(a[1])), make(*a)))
    assert build(tree, tmp_path / "killed", "--side", "64", "--splits", "train") == 0
    assert sum(made) == {"none": 4, "head": 12}.get(damage, sum(made))
    assert 4 <= sum(made) <= 12
    assert (tmp_path / "killed" / "train.pack").read_bytes() == (
        tmp_path / "whole" / "train.pack"
    ).read_bytes()
    assert os.listdir(tmp_path / "killed") == ["train.pack"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (BrokenProcessPool("A process was terminated abruptly."), "terminated abruptly"),
    ],
    ids=["a full disk", "a killed worker"],
)
def test_what_is_nobodys_mistake_is_told_in_a_sentence_and_the_build_goes_on(
    tree, tmp_path, monkeypatch, capsys, failure, told
):
    def fails(*_words):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(pack_build.Begun, "append", fails)
        assert build(tree, tmp_path / "packs", "--side", "64", "--splits", "train") == 1
    said = capsys.readouterr().err
    assert told in said
    assert "Run the same command to continue" in said
    assert build(tree, tmp_path / "packs", "--side", "64", "--splits", "train") == 0


def test_a_finished_pack_is_left_and_other_settings_are_refused(tree, tmp_path, capsys):
    build(tree, tmp_path / "packs", "--side", "64")
    before = (tmp_path / "packs" / "train.pack").stat().st_mtime_ns
    assert build(tree, tmp_path / "packs", "--side", "64") == 0
    assert (tmp_path / "packs" / "train.pack").stat().st_mtime_ns == before
    assert build(tree, tmp_path / "packs", "--side", "48") == 2
    assert "made with other settings" in capsys.readouterr().err


def test_a_build_begun_with_other_settings_is_refused(tree, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pack_build.Begun, "append", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        build(tree, tmp_path / "packs", "--side", "64")
    assert build(tree, tmp_path / "packs", "--side", "48") == 2
    assert "started with other settings or images" in capsys.readouterr().err


def test_a_truncated_image_is_named_and_no_pack_appears(tree, tmp_path, capsys):
    path = tree / "train" / WNIDS[1] / "n01443537_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    assert build(tree, tmp_path / "packs") == 2
    assert "error: n01443537/n01443537_3.JPEG cannot be decoded: " in capsys.readouterr().err
    assert not (tmp_path / "packs" / "train.pack").exists()


def test_damage_is_found(tree, tmp_path, capsys):
    build(tree, tmp_path / "packs", "--side", "64", "--splits", "train")
    path = tmp_path / "packs" / "train.pack"
    whole = path.read_bytes()
    assert main(["--verify", str(tmp_path / "packs")]) == 0
    for place, message in ((100, "image 0 of .* is damaged"), (-200, "the hash of its table does not match")):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        assert main(["--verify", str(tmp_path / "packs")]) == 2
        assert re.search(message, capsys.readouterr().err)
    for content, message in ((whole[:-1], "is truncated"), (b"x" + whole, "is not a pack of this version")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_pack(path)


def test_other_classes_are_refused(tree, tmp_path):
    build(tree, tmp_path / "packs", "--side", "64")
    with pytest.raises(ValueError, match="2 classes, which differ from the training set's 1"):
        open_split(tmp_path / "packs", "val", (WNIDS[0],))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--side", "8"], "side is 8; allowed: 0, or at least 32"),
        (["--quality", "0"], "quality is 0; allowed: 1 to 100"),
        (["--workers", "0"], "workers is 0"),
    ],
)
def test_impossible_options(tree, tmp_path, words, message, capsys):
    assert build(tree, tmp_path / "packs", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "packs").exists()


def test_the_command_does_not_import_torch(tree, tmp_path):
    for words in (["--help"], [str(tree), str(tmp_path / "packs"), "--side", "64"]):
        command = [sys.executable, "-X", "importtime", "-m", "conadv_lab.data.pack", *words]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "|" in line}
        assert "numpy" in imported
        assert "torch" not in imported
