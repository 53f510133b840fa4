"""The set of photographs and its stream: the same images whoever reads them, in any number of processes."""

import math
import os
import re
import signal
import sys
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest
import torch

from conadv_lab.config import Config, demand_of
from conadv_lab.data.crops import centre_crop
from conadv_lab.data.decode import Decoder
from conadv_lab.data.hashing import image_keys, uniform
from conadv_lab.data.imagenet import load_photographs, slots_of
from conadv_lab.data.imagenet_stream import PhotoStream
from conadv_lab.data.imagenet_view import DRAWS, View
from conadv_lab.data.imagenet_workers import Readers
from conadv_lab.data.loader import Stream
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.order import places
from conadv_lab.data.pack import main as pack_command
from tests.data.trees import write_tree

ALL = {"policy": "autoaugment", "erasing": 0.5, "mixup": 0.2}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def config_for(root: Path, **changes) -> Config:
    return Config().replace(**{
        "dataset": "imagenet", "data_dir": str(root), "pixels": 32, "eval_pixels": 32, "flip": True,
        "global_batch": 8, "micro_batch": 3, "method": "conadv", **changes,
    })  # fmt: skip


def wanted(config: Config) -> tuple[Data, Demand]:
    return config.data, demand_of(config)


def stream_for(root: Path, steps: int = 5, **changes) -> PhotoStream:
    config = config_for(root, **changes)
    train, _ = load_photographs(*wanted(config), "cpu")
    training = config.training
    return PhotoStream(
        train, mixup=config.data.mixup, seed=training.seed, batch=training.global_batch, steps=steps,
        micro_batch=training.micro_batch,
    )  # fmt: skip


def seen(stream: Stream, look_ahead: int = 1) -> list[tuple]:
    """All a method with look-ahead sees, batch by batch, each batch as bytes."""
    rows = []
    for number in range(stream.steps):
        step = stream.step(number, look_ahead)
        for offset in (look_ahead, 0, -1):
            if 0 <= number + offset < stream.steps:
                for b in step.batches(offset):
                    rows.append(
                        (number, offset, b.images.numpy().tobytes(), b.labels.tolist(), b.indices.tolist())
                    )
    return rows


def literal(root: Path, **changes) -> torch.Tensor:
    """The images of the first 8 places, made one by one from their files: the slow oracle."""
    config = config_for(root, **changes)
    train, _ = load_photographs(*wanted(config), "cpu")
    _, view = train.readers.sets[0]
    epochs, indices = places(0, len(train), 0, 8)
    images = []
    for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
        place = train._places(torch.tensor([index])).item()
        draws = uniform(image_keys(0, "photo", torch.tensor(epoch), torch.tensor([index])), DRAWS)[0].tolist()
        path = Path(root) / "train" / train.photos.name(place)
        images.append(view.augmented(path.read_bytes(), "x", Decoder(), draws).permute(2, 0, 1) / 255)
    return torch.stack(images)


@pytest.mark.parametrize("changes", [{}, {"policy": "randaugment", "erasing": 0.9}], ids=["plain", "policy"])
def test_a_step_holds_the_images_that_its_numbers_say(tree, changes):
    batches = list(stream_for(tree, **changes).step(0).batches())
    torch.testing.assert_close(torch.cat([b.images for b in batches]), literal(tree, **changes))
    for b in batches:
        assert b.images.dtype == torch.float32
        assert 0 <= b.images.min() < b.images.max() <= 1


@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "everything"])
def test_workers_room_and_micro_batches_change_nothing(tree, changes):
    expected = seen(stream_for(tree, **changes))
    assert len({row[2] for row in expected}) == 5 * 3  # five steps of three different micro-batches
    for variant in ({"workers": 1}, {"workers": 2}, {"workers": 2, "keep_gb": 0.0}, {"keep_gb": 0.0}):
        assert seen(stream_for(tree, **changes, **variant)) == expected, variant
    whole, parts = stream_for(tree, micro_batch=8, **changes), stream_for(tree, **changes)
    for number in range(3):
        for what in ("images", "labels"):
            one, other = (
                torch.cat([getattr(b, what) for b in s.step(number).batches()]) for s in (whole, parts)
            )
            assert torch.equal(one, other)


def test_all_of_a_batch_is_sent_so_that_nobody_waits(tree, monkeypatch):
    """Images, labels, epochs with indices, and mixup's weights: on a GPU each by the copy that does not wait."""
    sizes = []
    for module in ("imagenet", "imagenet_stream"):
        monkeypatch.setattr(
            f"conadv_lab.data.{module}.sent", lambda values, _: (sizes.append(values.numel()), values)[1]
        )
    next(iter(stream_for(tree, mixup=0.2).step(1).batches()))
    assert sorted(sizes) == [3, 4, 8, 4 * 3 * 32**2]  # three images, and the one before them


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"mixup": 0.2}], ids=["plain", "mixup"])
def test_a_gpu_gets_the_same_images_and_the_host_does_not_wait(tree, changes):
    streams = []
    for device in ("cpu", "cuda"):
        config = config_for(tree, workers=1, **changes)
        train, _ = load_photographs(*wanted(config), device)
        streams.append(PhotoStream(train, mixup=config.data.mixup, seed=0, batch=8, steps=5, micro_batch=3))
    ours = [b.images for number in range(5) for b in streams[0].step(number).batches()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        theirs = [b.images for number in range(5) for b in streams[1].step(number).batches()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=1e-6)


class HalfStream(PhotoStream):
    """One of two ranks: every second micro-batch."""

    rank = 0

    def own_spans(self, number):
        return self.groups(number)[self.rank :: 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_together_what_one_sees(tree, workers):
    expected = {row[2] for row in seen(stream_for(tree, mixup=0.2))}
    halves = []
    for rank in (0, 1):
        stream = stream_for(tree, mixup=0.2, workers=workers)
        stream.__class__, stream.rank = HalfStream, rank
        halves.append({row[2] for row in seen(stream)})
    assert halves[0] | halves[1] == expected
    assert not halves[0] & halves[1]


def test_real_photographs_are_the_same_for_any_readers_and_ranks(tmp_path):
    photos = os.environ.get("CONADV_PHOTOS")
    if not photos:
        pytest.skip("CONADV_PHOTOS names no folder that holds train/<class>/<photograph>")
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(Path(photos) / "train", target_is_directory=True)
    options = {"pixels": 224, "policy": "randaugment", "mixup": 0.2, "global_batch": 20, "micro_batch": 5}
    expected = seen(stream_for(tmp_path, **options))
    for workers in (1, 2):
        assert seen(stream_for(tmp_path, workers=workers, **options)) == expected
    halves = []
    for rank in (0, 1):
        stream = stream_for(tmp_path, workers=1, **options)
        stream.__class__, stream.rank = HalfStream, rank
        halves.append({row[2] for row in seen(stream)})
    assert halves[0] | halves[1] == {row[2] for row in expected}


def test_epochs_and_seeds_see_other_crops_and_the_same_ones_again(tree):
    rows = [stream_for(tree, steps=9, seed=seed) for seed in (0, 0, 1)]
    one, two, three = ([b.images for n in range(9) for b in s.step(n).batches()] for s in rows)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert len({image.numpy().tobytes() for batch in one for image in batch}) == 72


def test_what_is_wanted_again_is_decoded_once_where_there_is_room(tree, monkeypatch):
    begun = []
    original = Readers.begin
    monkeypatch.setattr(Readers, "begin", lambda self, *a: (begun.append(a), original(self, *a))[1])
    for room, readings in ((1.0, 15), (0.0, 39)):
        begun.clear()
        seen(stream_for(tree, keep_gb=room))
        assert len(begun) == readings, room  # 5 steps of 3 micro-batches; 13 times 3 are asked for


def test_reading_ahead_has_the_next_micro_batches_under_way(tree):
    stream = stream_for(tree, workers=2, micro_batch=8)
    next(iter(stream.step(0).batches()))
    assert list(stream._held) == [(8 * n, 8 * n + 8) for n in (1, 2, 3, 4)] or (0, 8) in stream._held
    assert len(stream._held) == 5  # all of the five steps, and none beyond


def test_evaluation_shows_the_middle(tree):
    train, test = load_photographs(*wanted(config_for(tree, eval_pixels=40)), "cpu")
    images, labels = test.fetch(torch.tensor([0, 5, 3]))
    assert images.shape == (3, 3, 40, 40)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 2, 1]
    path = sorted((tree / "val").rglob("*.JPEG"))[5]
    expected = centre_crop(Decoder()(path.read_bytes(), ""), round(40 * 256 / 224), 40)
    assert torch.equal(images[1], expected.permute(2, 0, 1))
    assert train.fetch(torch.arange(24))[1].unique().tolist() == [0, 1, 2]


def test_fetching_more_than_a_slot_holds_in_pieces(tree):
    whole = load_photographs(*wanted(config_for(tree, micro_batch=8)), "cpu")[0].fetch(torch.arange(20))
    for workers in (0, 2):
        pieces = load_photographs(*wanted(config_for(tree, micro_batch=3, workers=workers)), "cpu")[0].fetch(
            torch.arange(20)
        )
        assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("changes", [{}, {"policy": "randaugment", "erasing": 0.9}], ids=["plain", "policy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_images_of_any_epoch_are_those_of_the_steps(tree, changes, workers):
    """What batch norm's statistics are re-estimated on: random crops, and more of them than a slot holds."""
    stream = stream_for(tree, workers=workers, **changes)
    batches = [batch for number in range(5) for batch in stream.step(number).batches()]
    epochs, indices, images = (
        torch.cat([getattr(batch, what) for batch in batches]) for what in ("epochs", "indices", "images")
    )
    assert epochs.unique().tolist() == [0, 1]
    order = torch.arange(39, -1, -1)
    again = stream_for(tree, workers=workers, **changes).images_of(epochs[order], indices[order])
    assert torch.equal(again.images, images[order])
    assert torch.equal(again.labels, torch.cat([batch.labels for batch in batches])[order])
    shown, _ = stream.images.fetch(indices)
    assert not any(torch.equal(one / 255, other) for one, other in zip(shown, images, strict=True))


def test_images_of_the_re_estimation_are_mixed_as_those_of_the_steps(tree):
    """In the order of the run, each is mixed with the one before it."""
    mixed = stream_for(tree, mixup=0.2, micro_batch=8)
    first = next(iter(mixed.step(0).batches()))
    again = stream_for(tree, mixup=0.2, micro_batch=3).images_of(first.epochs, first.indices)
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)
    plain = stream_for(tree).images_of(first.epochs, first.indices)
    assert not torch.equal(plain.images, first.images)


def test_the_first_images_of_the_training_set_are_of_all_classes(tree):
    train, _ = load_photographs(*wanted(config_for(tree, train_images=12)), "cpu")
    assert len(train) == 12
    assert train.fetch(torch.arange(12))[1].unique().tolist() == [0, 1, 2]
    assert "12 of 24 images, sha256" in train.fingerprint()


def test_a_pack_is_read_as_its_folders_are(tree, tmp_path):
    assert pack_command([str(tree), str(tmp_path), "--side", "0", "--workers", "1"]) == 0
    assert seen(stream_for(tmp_path)) == seen(stream_for(tree))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    write_tree(tmp_path, train=4, val=1)
    path = tmp_path / "train" / "n00000001" / "n00000001_0.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    stream = stream_for(tmp_path, steps=2, micro_batch=8, workers=workers)
    with pytest.raises(
        OSError, match=r"n00000001/n00000001_0\.JPEG cannot be decoded.*continue with --resume"
    ):
        seen(stream)


def wait_until_deaf(pid: int) -> None:
    """Return once a process ignores the stop signals."""
    status, until = Path(f"/proc/{pid}/status"), time.monotonic() + 30
    stops = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT))
    while int(re.search(r"SigIgn:\s*(\w+)", status.read_text()).group(1), 16) & stops != stops:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what another process ignores")
def test_workers_ignore_stop_signals_and_a_dead_one_is_told(tree):
    stream = stream_for(tree, workers=2, steps=40, keep_gb=0.0)
    assert len(list(stream.step(0).batches())) == 3
    processes = list(stream.images.readers._pool._processes.values())
    for process in processes:  # one of them may have made everything before the other was ready
        wait_until_deaf(process.pid)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        for process in processes:
            os.kill(process.pid, number)
    assert len(list(stream.step(20).batches())) == 3
    assert all(process.is_alive() for process in processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(OSError, match="a loader worker died"):
        seen(stream)
    with pytest.raises(OSError, match="a loader worker died"):  # also where it is known before it is asked
        stream.images.readers.begin(0, 0, np.arange(2), None)
    # The pool ends the other, though it ignores TERM; leaving would wait for it. The sentinel is asked, for the pool
    # waits for the process too, and is_alive() is true for whoever comes second until the first has noted the end.
    assert connection.wait([processes[1].sentinel], timeout=30)


def test_slots_are_few_for_vanilla_and_many_where_images_are_kept(tree):
    vanilla = slots_of(*wanted(config_for(tree, method="vanilla", pixels=224, eval_pixels=224, workers=4)))
    kept = slots_of(*wanted(config_for(tree, pixels=224, eval_pixels=224, workers=4, keep_gb=0.1)))
    assert vanilla == (2 + 2 * (1 + 1 + 2 * 4 * 32 // 3), 3)
    assert kept == (vanilla[0] + int(0.1e9 / (3 * 3 * 224**2)), 3)


def erased_pixel_by_pixel(plain: list, draws: list[float], probability: float) -> list:
    """Zhong et al. 2020, algorithm 1, as written: one pixel after another. Ratio is height over width."""
    side = len(plain)
    if draws[0] >= probability:
        return plain
    for attempt in range(10):
        of_area, of_ratio, of_top, of_left = draws[1 + 4 * attempt : 5 + 4 * attempt]
        area = side * side * (0.02 + (0.33 - 0.02) * of_area)
        ratio = 0.3 * (3.3 / 0.3) ** of_ratio
        height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if height < side and width < side:
            top, left = math.floor(of_top * (side - height + 1)), math.floor(of_left * (side - width + 1))
            inside = {(y, x) for y in range(top, top + height) for x in range(left, left + width)}
            return [
                [[124, 116, 104] if (y, x) in inside else plain[y][x] for x in range(side)]
                for y in range(side)
            ]
    return plain


def test_erasing_is_that_of_a_slow_rendering(tree):
    path = next((tree / "train").rglob("*_0.JPEG"))
    erased = 0
    for row in uniform(image_keys(3, "photo", torch.tensor(0), torch.arange(40)), DRAWS).tolist():
        plain, ours = (
            View(32, 36, erasing=p).augmented(path.read_bytes(), "x", Decoder(), row).tolist()
            for p in (0.0, 0.6)
        )
        assert ours == erased_pixel_by_pixel(plain, row[-41:], 0.6)
        erased += ours != plain
    assert 10 < erased < 35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": 25}, "train_images is 25; allowed: 1 to 24"),
        ({"data_dir": "/nowhere"}, "no ImageNet train images in /nowhere"),
        (
            {"global_batch": 10**11, "micro_batch": 10**11},
            r"could not allocate the image buffer of .* reduce micro_batch",
        ),
    ],
)
def test_impossible_sets(tree, changes, message):
    with pytest.raises(ValueError, match=message):
        load_photographs(*wanted(config_for(tree, **changes)), "cpu")
