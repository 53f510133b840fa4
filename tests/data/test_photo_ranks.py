"""Photographs over two ranks: what `train --ranks 2` gives both together is what one rank gets, image by image."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from conadv_lab import train
from conadv_lab.config import Config
from conadv_lab.methods.adversarial import ConAdv
from conadv_lab.methods.attack import SignAttack
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


def test_two_real_ranks_are_given_together_what_one_is(tmp_path):
    write_tree(tmp_path)
    words = [
        "imagenet-resnet50-4k", "--data-dir", str(tmp_path), "--pixels", "32", "--eval-pixels", "32",
        "--policy", "autoaugment", "--erasing", "0.5", "--mixup", "0.2", "--workers", "1", "--precision", "float32",
        "--no-channels-last", "--model", f"{__file__}:network", "--method", f"{__file__}:recorded",
        "--global-batch", str(BATCH), "--micro-batch", "2", "--steps", str(STEPS), "--warmup-epochs", "0",
        "--bn-recalibrate", "0", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
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
