"""Data sets on the training device."""

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
    """Images that stay on the device: (N, C, H, W) uint8 or float in [0, 1], and (N,) int64 labels.

    Raises:
        ValueError: shapes, dtypes or values that are not images and labels.
    """

    images: Tensor
    labels: Tensor
    classes: int
    resident = True  # `fetch` takes indices on the device and never synchronises with the host

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
                    f"{int(broken.sum())} images contain NaN or infinity, the first at index "
                    f"{int(broken.nonzero()[0])}; allowed: floats in [0, 1]"
                )
            if len(images) and (images.min() < 0 or images.max() > 1):
                raise ValueError(
                    f"images range from {images.min():.4g} to {images.max():.4g}; allowed: [0, 1]"
                )
        require(self.classes >= 1, "classes", self.classes, "a whole number of at least 1")
        require(
            labels.dtype == torch.int64, "labels' dtype", str(labels.dtype), "torch.int64, as labels.long()"
        )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
            raise ValueError(
                f"labels range from {int(labels.min())} to {int(labels.max())}; allowed: 0 to {self.classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        places = sent(indices, self.labels.device)
        return self.images[places], self.labels[places]

    def to(self, device: torch.device) -> "TensorSet":
        return TensorSet(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, count: int) -> "TensorSet":
        """The first ``count`` images of a fixed shuffle."""
        return TensorSet(*self.fetch(_shuffled(len(self))[:count]), self.classes)

    def fingerprint(self) -> str:
        digest = sha256(self.images.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return f"{len(self)} images, sha256 {digest.hexdigest()[:16]}"


class AnySet:
    """A user's `ImageSet`, on the training device; its images are checked when they are fetched.

    Args:
        images: the set; its images and labels may be on any device.
        chosen: (n,) int64, the images to use; None for all.
    """

    def __init__(
        self, images: ImageSet, device: torch.device | None = None, chosen: Tensor | None = None
    ) -> None:
        self.images, self.device, self.chosen = images, device or torch.device("cpu"), chosen
        self.classes = images.classes
        own = getattr(images, "fingerprint", None)
        if own is not None:  # a set without one is identified by its size alone
            self.fingerprint = lambda: f"{len(self)} of {own()}"

    def __len__(self) -> int:
        return len(self.images) if self.chosen is None else len(self.chosen)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch and check.

        Raises:
            ValueError: the set returns something other than images and labels, or the wrong number of them.
        """
        wanted = indices.cpu() if self.chosen is None else self.chosen[indices.cpu()]
        fetched = self.images.fetch(wanted)
        if not isinstance(fetched, (tuple, list)) or len(fetched) != 2:
            raise ValueError(f"fetch returned {type(fetched).__name__}; allowed: (images, labels)")
        checked = TensorSet(*fetched, self.classes)
        require(len(checked) == len(indices), "the number of images fetched", len(checked), f"{len(indices)}")
        return sent(checked.images, self.device), sent(checked.labels, self.device)

    def to(self, device: torch.device) -> "AnySet":
        return AnySet(self.images, device, self.chosen)

    def subset(self, count: int) -> "AnySet":
        """The first ``count`` images of a fixed shuffle."""
        return AnySet(self.images, self.device, _shuffled(len(self.images))[:count])


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=generator(0, "subset"), device="cpu")


def load_sets(
    section: Data, demand: Demand, device: torch.device, given: Any = None
) -> tuple[ImageSet, ImageSet]:
    """Training and test set for a config's section.

    Args:
        given: the argument for a user's function: the config.

    Raises:
        ValueError: a missing or broken archive, or a batch above the set's size.
    """
    name = section.dataset
    own = is_file_reference(name)
    train, test = _users_own(section, given) if own else DATASETS[name].load()(section, demand, device)
    if name == "synthetic":
        return train, test
    if section.train_images is not None and not is_photographs(train):  # they already have this many
        require_images(section, len(train))
        train = train.subset(section.train_images)
    require_enough(name, len(train), demand.global_batch)
    return train.to(device), test.to(device)


def is_photographs(images: ImageSet) -> bool:
    """Whether a set has photographs, which are augmented while they are read."""
    return hasattr(images, "augmented")


def require_images(section: Data, images: int) -> None:
    wanted = section.train_images
    require((wanted or 0) <= images, "train_images", wanted, f"1 to {images}, the set's size")


def require_enough(name: str, images: int, global_batch: int) -> None:
    require(
        global_batch <= images, "global_batch", global_batch, f"1 to {images}, the training images of {name}"
    )


def _users_own(section: Data, given: Any) -> tuple[Any, Any]:
    sets = references.made(section.dataset, given, returns="two ImageSets, train and test")
    parts = sets if isinstance(sets, (tuple, list)) else (sets,)
    if len(parts) != 2 or not all(isinstance(part, ImageSet) for part in parts):
        found = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"{section.dataset} returned {found}; allowed: two ImageSets, train and test, such as TensorSets"
        )
    for part, split in zip(parts, ("training", "test"), strict=True):
        told = f"the number of images in the {split} set of {section.dataset}"
        require(len(part) > 0, told, len(part), "at least 1")
    if parts[0].classes != parts[1].classes:
        raise ValueError(
            f"{section.dataset} has {parts[0].classes} classes for training and {parts[1].classes} for the test; "
            "allowed: the same number"
        )
    section.check_augmentation(is_photographs(parts[0]))
    train, test = (part if hasattr(part, "to") else AnySet(part) for part in parts)
    return train, test
