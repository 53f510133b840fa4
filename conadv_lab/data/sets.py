"""Data sets by name, on the training device."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from conadv_lab import references
from conadv_lab.data.loader import ImageSet
from conadv_lab.data.options import DATASETS, Data, Demand
from conadv_lab.data.transfer import sent
from conadv_lab.mistakes import require
from conadv_lab.references import is_file_reference
from conadv_lab.seeds import generator


@dataclass(frozen=True)
class TensorSet:
    """Images that live on the device: (N, C, H, W) uint8 or float in [0, 1], and (N,) int64 labels.

    Raises:
        ValueError: shapes, types or values that are not images and labels.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images of shape {tuple(images.shape)} with labels of shape {tuple(labels.shape)}; "
                "allowed: (N, C, H, W) with (N,)"
            )
        if images.dtype != torch.uint8:
            if not images.is_floating_point():
                raise ValueError(f"images are {images.dtype}; allowed: uint8, or floats in [0, 1]")
            broken = ~torch.isfinite(images).flatten(1).all(1)
            if broken.any():
                raise ValueError(
                    f"{int(broken.sum())} images hold NaN or infinity, the first at index "
                    f"{int(broken.nonzero()[0])}; allowed: floats in [0, 1]"
                )
            if len(images) and (images.min() < 0 or images.max() > 1):
                raise ValueError(
                    f"images reach from {images.min():.4g} to {images.max():.4g}; allowed: [0, 1]"
                )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
            raise ValueError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}; allowed: 0 to {self.classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        places = sent(indices, self.labels.device)
        return self.images[places], self.labels[places]

    def to(self, device: torch.device) -> "TensorSet":
        return TensorSet(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, count: int) -> "TensorSet":
        """``count`` images of a shuffle that depends on nothing else."""
        chosen = torch.randperm(len(self), generator=generator(0, "subset"), device="cpu")[:count]
        return TensorSet(*self.fetch(chosen), self.classes)

    def fingerprint(self) -> str:
        digest = sha256(self.images.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return f"{len(self)} images, sha256 {digest.hexdigest()[:16]}"


def load_sets(
    section: Data, demand: Demand, device: torch.device, given: Any = None
) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a config's section.

    Args:
        given: what a function of the user's own is called with: the config.

    Raises:
        ValueError: a missing or broken archive, or a batch above the set's size.
    """
    name = section.dataset
    own = is_file_reference(name)
    train, test = _users_own(name, given) if own else DATASETS[name].load()(section, demand, device)
    if isinstance(train, TensorSet):
        if section.train_images is not None:
            require_images(section, len(train))
            train = train.subset(section.train_images)
        train, test = train.to(device), test.to(device)
    if name != "synthetic":
        require_enough(name, len(train), demand.global_batch)
    return train, test


def require_images(section: Data, images: int) -> None:
    wanted = section.train_images
    require((wanted or 0) <= images, "train_images", wanted, f"1 to {images}, the set's size")


def require_enough(name: str, images: int, global_batch: int) -> None:
    require(
        global_batch <= images, "global_batch", global_batch, f"1 to {images}, the training images of {name}"
    )


def _users_own(name: str, given: Any) -> tuple[TensorSet, TensorSet]:
    sets = references.made(name, given, returns="two TensorSets, train and test")
    parts = sets if isinstance(sets, (tuple, list)) else (sets,)
    if len(parts) != 2 or not all(isinstance(part, TensorSet) for part in parts):
        found = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"{name} returned {found}; allowed: two TensorSets, train and test")
    return parts[0], parts[1]
