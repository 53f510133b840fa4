"""Photographs over two ranks: what `train --ranks 2` gives both together is what one rank gets, image by image."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conadv_lab import train
from conadv_lab.config import Config
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.families.conadv import ConAdv
from tests.data.trees import write_tree

STEPS, BATCH = 3, 8


def network(_config: Config) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))


class Recorded(ConAdv):
    """ConAdv that writes down each image that it is given: offset, step, epoch, index, hash of it and its label."""

    def __init__(self, file: Path) -> None:
        super().__init__(SignAttack(1 / 255))
        self.file = file

    def backward(self, model, step, criterion):
        with self.file.open("a") as file:
            for offset in range(step.last - step.number + 1)[:2]:
                for b in step.batches(offset):
                    for image, label, *who in zip(b.images, b.labels, b.epochs, b.indices, strict=True):
                        digest = hashlib.sha256(
                            image.contiguous().numpy().tobytes() + label.numpy().tobytes()
                        )
                        epoch, index = (int(number) for number in who)
                        print(offset, step.number + offset, epoch, index, digest.hexdigest(), file=file)
        return super().backward(model, step, criterion)


def recorded(config: Config) -> Recorded:
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return Recorded(Path(config.data.data_dir) / f"rank-{rank}-of-{ranks}.txt")


def words_for(tree: Path) -> list[str]:
    return [
        "imagenet-resnet50-4k", "--data-dir", str(tree), "--pixels", "32", "--eval-pixels", "32",
        "--policy", "autoaugment", "--erasing", "0.5", "--mixup", "0.2", "--workers", "1", "--precision", "float32",
        "--no-channels-last", "--model", f"{__file__}:network", "--method", f"{__file__}:recorded",
        "--global-batch", str(BATCH), "--micro-batch", "2", "--steps", str(STEPS), "--warmup-epochs", "0",
        "--bn-recalibrate", "0", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_real_ranks_are_given_together_what_one_is(tmp_path):
    write_tree(tmp_path)
    words = words_for(tmp_path)
    assert train.main([*words, "--out", str(tmp_path / "alone")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "conadv_lab.train", *words, "--ranks", "2", "--out", str(tmp_path / "both")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = (tmp_path / "rank-0-of-1.txt").read_text().splitlines()
    both = [(tmp_path / f"rank-{rank}-of-2.txt").read_text().splitlines() for rank in (0, 1)]
    assert len(alone) == BATCH * (2 * STEPS - 1)  # each step's own, and the next one's but for the last
    assert len({line.rpartition(" ")[2] for line in alone}) == BATCH * STEPS  # no two images are alike
    assert len(both[0]) == len(both[1])
    assert sorted(both[0] + both[1]) == sorted(alone)


def test_what_is_advised_about_a_broken_image_works(tmp_path, capsys):
    """Mended, a run goes on; without the image the set is another one, which only a new run takes."""
    write_tree(tmp_path, train=4)
    broken = tmp_path / "train" / "n00000001" / "n00000001_0.JPEG"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:300])
    words = [*words_for(tmp_path), "--workers", "0", "--checkpoint-every", "1"]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "n00000001_0.JPEG cannot be decoded" in said
    assert "replace it with an intact copy and continue with --resume" in said
    assert "leaving it out changes the data set, which needs a new run with another --out" in said
    broken.unlink()
    assert train.main([*words, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "was started with other data" in capsys.readouterr().err
    assert train.main([*words, "--out", str(tmp_path / "another")]) == 0
    broken.write_bytes(intact)
    assert train.main([*words, "--out", str(tmp_path / "run"), "--resume"]) == 0
