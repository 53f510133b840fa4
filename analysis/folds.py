"""Data sets for tuning: four fifths of the training images train, the rest validate; the test set stays unseen."""

import torch
from torch import Tensor

from conadv_lab.config import Config
from conadv_lab.data.sets import TensorSet
from conadv_lab.seeds import generator

FOLDS = 5
DIGITS = "analysis/folds.py:digits"
CIFAR10 = "analysis/folds.py:cifar10"
CIFAR10_PART = "analysis/folds.py:cifar10_part"
BESIDE = 5_000


def digits(config: Config) -> tuple[TensorSet, TensorSet]:
    """(training, validation) images: fold ``seed % 5`` of the 898 training images is left out to validate on."""
    from conadv_lab.data.digits import load_digits

    images, labels, _, _ = load_digits()
    return _parted(images, labels, config.training.seed)


def cifar10(config: Config) -> tuple[TensorSet, TensorSet]:
    """(training, validation) images: fold ``seed % 5`` of CIFAR-10's 50,000 training images is left out."""
    from conadv_lab.data.cifar import load_cifar

    images, labels, _, _ = load_cifar(config.data.data_dir, "cifar10", download=config.data.download)
    return _parted(images, labels, config.training.seed)


def cifar10_part(config: Config) -> tuple[TensorSet, TensorSet]:
    """(training, validation) images: the ``train_images`` of a run on a part of CIFAR-10, and 5,000 others."""
    from conadv_lab.data.cifar import load_cifar

    images, labels, _, _ = load_cifar(config.data.data_dir, "cifar10", download=config.data.download)
    train = TensorSet(images, labels, 10)
    used = config.data.train_images or len(train) - BESIDE
    both = train.subset(used + BESIDE)  # of one shuffle, whatever the number
    return train.subset(used), TensorSet(both.images[used:], both.labels[used:], 10)


def _parted(images: Tensor, labels: Tensor, seed: int) -> tuple[TensorSet, TensorSet]:
    parts = torch.randperm(len(labels), generator=generator(0, "folds")).tensor_split(FOLDS)
    fold = seed % FOLDS
    kept = torch.cat([part for number, part in enumerate(parts) if number != fold])
    return TensorSet(images[kept], labels[kept], 10), TensorSet(images[parts[fold]], labels[parts[fold]], 10)


def scaled(batch: int) -> int:
    """The same part of the smaller set, and even, as the equal-cost forms need.

    >>> scaled(898), scaled(64)
    (718, 52)
    """
    return 2 * round(batch * (FOLDS - 1) / FOLDS / 2)
