"""Small sets and networks that many tests share; every test runs on one thread, so that it is repeatable.

A GPU is hidden from the tests, which ask for the same bits, but from those that are marked ``gpu``: make test-gpu.
"""

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from conadv_lab.data.sets import TensorSet

GPU = os.environ.get("CONADV_TEST_GPU") == "1"
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU and torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and make test-gpu"))


def rest_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases of a parametrised test, those that are not named as quick left to ``make test-slow``."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def image_set(
    count: int = 50, classes: int = 4, size: int = 6, channels: int = 2, seed: int = 0
) -> TensorSet:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=draw, dtype=torch.uint8)
    return TensorSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


def double(images: torch.Tensor, _epochs: torch.Tensor, _indices: torch.Tensor) -> torch.Tensor:
    """An augmentation that changes nothing but the precision."""
    return images.double()


def small_cnn(classes: int = 4, channels: int = 2, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9, classes),
        )
