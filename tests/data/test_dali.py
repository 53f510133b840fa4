"""DALI's pixels: the native reader's to rounding, in the same order, whoever wants them and however often."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conadv_lab.config import Config, resolved
from conadv_lab.data import imagenet_dali
from conadv_lab.data.decode import jpeg_size
from conadv_lab.data.imagenet import load_photographs
from conadv_lab.data.imagenet_dali import DaliReaders
from conadv_lab.data.imagenet_view import View
from conadv_lab.training.loop import train
from tests.data.photos import encoded, photo
from tests.data.test_imagenet import config_for, seen, stream_for, wanted
from tests.data.trees import write_tree

DALI = {"reader": "dali"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def dali():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra dali)")


def differences(root: Path, count: int, **changes) -> np.ndarray:
    """(count, S, S, 3) absolute differences of the two readers' augmented images, in units of 1/255."""
    both = []
    for reader in ("native", "dali"):
        stream = stream_for(root, global_batch=count, micro_batch=count, reader=reader, **changes)
        both.append(stream.pixels(0, count).permute(0, 2, 3, 1).numpy().astype(int).copy())
    return np.abs(both[0] - both[1])


@pytest.mark.parametrize("changes", [{}, {"erasing": 0.9}], ids=["plain", "erasing"])
def test_images_are_the_native_readers_to_rounding(dali, tree, changes):
    apart = differences(tree, 24, **changes)
    assert apart.mean() < 0.5
    assert apart.max() < 32  # another crop, or no flip, is 60 and more apart in the mean alone
    assert apart.any(), "DALI had no part in it"


@pytest.mark.parametrize("changes", [{"eval_pixels": 32}, {"eval_pixels": 40, "eval_resize": 40}])
def test_the_middle_is_the_native_readers_to_rounding(dali, tree, changes):
    ours, theirs = (
        load_photographs(*wanted(config_for(tree, micro_batch=8, reader=reader, **changes)), "cpu")[0].fetch(
            torch.arange(24)
        )
        for reader in ("native", "dali")
    )
    assert torch.equal(ours[1], theirs[1])
    apart = (ours[0].int() - theirs[0].int()).abs()
    assert apart.float().mean() < 0.5
    assert apart.max() < 32


def test_photographs_are_within_what_is_stated(dali, tmp_path):
    photos = os.environ.get("CONADV_PHOTOS")
    if not photos:
        pytest.skip("CONADV_PHOTOS names no folder that holds train/<class>/<photograph>")
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(Path(photos) / "train", target_is_directory=True)
    apart = differences(tmp_path, 100, pixels=224)
    print(f"mean {apart.mean():.3f}, largest {apart.max()}, within 1 {np.mean(apart <= 1):.4%}")
    assert apart.mean() < 0.2
    assert np.mean(apart <= 1) > 0.999
    assert apart.max() <= 20


def test_workers_room_and_micro_batches_change_nothing(dali, tree, monkeypatch):
    monkeypatch.setattr(DaliReaders, "chunk", 2)  # several of DALI's batches a micro-batch
    changes = DALI | {"erasing": 0.5, "mixup": 0.2}
    expected = seen(stream_for(tree, **changes))
    for variant in ({"workers": 1}, {"workers": 3, "keep_gb": 0.0}):
        assert seen(stream_for(tree, **changes, **variant)) == expected, variant
    whole, parts = stream_for(tree, micro_batch=8, **changes), stream_for(tree, **changes)
    for number in range(3):
        one, other = (torch.cat([b.images for b in s.step(number).batches()]) for s in (whole, parts))
        assert torch.equal(one, other)


FILES = {
    "4:2:0": (lambda: encoded(photo(20, 31), subsampling=2), True),
    "grey": (lambda: encoded(photo(20, 31).convert("L")), True),
    "CMYK": (lambda: encoded(photo(20, 31).convert("CMYK")), False),
    "RGB channels": (lambda: encoded(photo(20, 31), keep_rgb=True), False),
    "PNG": (lambda: encoded(photo(20, 31), "PNG"), False),
    "truncated": (lambda: encoded(photo(20, 31))[:-40], False),
    "bytes after the end": (lambda: encoded(photo(20, 31)) + b"\0" * 9, False),
    "no image": (lambda: b"\xff\xd8\xff" + b"x" * 99 + b"\xff\xd9", False),
}


@pytest.mark.parametrize("kind", FILES)
def test_only_usual_jpegs_have_a_size(kind):
    make, usual = FILES[kind]
    assert jpeg_size(make()) == ((31, 20) if usual else None)


def test_odd_files_are_the_native_readers_own(dali, tmp_path):
    """Of the tree's kinds, number 2 of a class is CMYK and number 3 a PNG."""
    write_tree(tmp_path, train=4, val=1)
    stream = stream_for(tmp_path, global_batch=12, micro_batch=12, **DALI)
    apart = differences(tmp_path, 12).reshape(12, -1).max(1)
    order = next(iter(stream.step(0).batches())).indices
    odd = [place % 4 in (2, 3) for place in stream.images._places(order).tolist()]
    assert sum(odd) == 6
    assert not apart[odd].any()
    assert apart[np.logical_not(odd)].any()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [lambda whole: whole[:300], lambda whole: whole[:200] + b"\xff\xd9"])
def test_a_broken_image_is_named(dali, tmp_path, workers, content):
    write_tree(tmp_path, train=4, val=1)
    path = tmp_path / "train" / "n00000001" / "n00000001_0.JPEG"
    path.write_bytes(content(path.read_bytes()))
    stream = stream_for(tmp_path, steps=2, micro_batch=8, workers=workers, **DALI)
    with pytest.raises(OSError, match=r"n00000001_0\.JPEG cannot be decoded.*continue with --resume"):
        seen(stream)
    stream.images.readers.close()


def test_a_run_resumes_bitwise_and_notices_other_pixels(dali, tree, tmp_path):
    config = resolved(config_for(
        tree, model=f"{__file__}:network", steps=4, checkpoint_every=2, bn_recalibrate=0, device="cpu", threads=1,
        **DALI,
    ))  # fmt: skip
    folder = train(config, tmp_path / "run", progress="none")
    assert folder.manifest()["data"].endswith("pixels by DALI on cpu")
    result = folder.result()
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    train(config, tmp_path / "run", resume=True, progress="none")
    assert folder.result()["parameters_sha256"] == result["parameters_sha256"]
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ValueError, match="reader is 'native', was 'dali'"):
        train(config.replace(reader="native"), tmp_path / "run", resume=True, progress="none")


def network(_config: Config) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))


def test_without_dali_the_command_is_told(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"'dali' needs nvidia.dali, which .* 'conadv-lab\[dali\]'"):
        load_photographs(*wanted(config_for(tree, **DALI)), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digits", "flip": False}, "reader is 'dali'; allowed with dataset digits: 'native'"),
        ({"policy": "randaugment"}, "policy is 'randaugment'; allowed with reader 'dali': 'none'"),
    ],
)
def test_what_dali_does_not_do(changes, message):
    with pytest.raises(ValueError, match=message):
        resolved(config_for(Path("x"), **DALI, **changes))


def test_a_cut_is_what_the_view_cuts():
    view = View(32, 36)
    assert imagenet_dali.cut_of(view, 50, 90, None) == ((0, 0, 50, 90), (2, 16, 36, 64), False)
    draws = [0.5] * 40 + [0.2] + [0.5] * 47
    assert imagenet_dali.cut_of(view, 50, 90, draws) == (view.box(50, 90, draws), (0, 0, 32, 32), True)
