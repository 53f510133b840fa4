"""Data sets by name, on the training device."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from conadv_lab import references
from conadv_lab.config import Config
from conadv_lab.data.loader import ImageSet
from conadv_lab.data.transfer import sent
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


def load_sets(config: Config, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a config.

    Raises:
        ValueError: a missing or broken archive, or a batch above the set's size.
    """
    data = config.data
    if data.dataset == "synthetic":
        from conadv_lab.data.synthetic import Synthetic

        shape = (3, data.synthetic_pixels, data.synthetic_pixels)
        made = Synthetic(data.synthetic_images, shape, device=device)
        return made, Synthetic(1_000, shape, seed=1, device=device)
    if data.dataset == "imagenet":
        from conadv_lab.data.imagenet import load_imagenet

        photos, shown = load_imagenet(config, device)
        require_enough(config, len(photos))
        return photos, shown
    train, test = _real_sets(config)
    if data.train_images is not None:
        if data.train_images > len(train):
            raise ValueError(
                f"train_images is {data.train_images}; allowed: 1 to {len(train)}, the set's size"
            )
        train = train.subset(data.train_images)
    require_enough(config, len(train))
    return train.to(device), test.to(device)


def require_enough(config: Config, images: int) -> None:
    if config.training.global_batch > images:
        raise ValueError(
            f"global_batch is {config.training.global_batch}; allowed: 1 to {images}, "
            f"the training images of {config.data.dataset}"
        )


def _real_sets(config: Config) -> tuple[TensorSet, TensorSet]:
    name = config.data.dataset
    if is_file_reference(name):
        sets = references.made(name, config, returns="two TensorSets, train and test")
        parts = sets if isinstance(sets, (tuple, list)) else (sets,)
        if len(parts) != 2 or not all(isinstance(part, TensorSet) for part in parts):
            found = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(f"{name} returned {found}; allowed: two TensorSets, train and test")
        return parts[0], parts[1]
    if name == "digits":
        from conadv_lab.data.digits import load_digits

        images, labels, test_images, test_labels = load_digits()
        return TensorSet(images, labels, 10), TensorSet(test_images, test_labels, 10)
    from conadv_lab.data.cifar import load_cifar

    images, labels, test_images, test_labels = load_cifar(
        config.data.data_dir, name, download=config.data.download
    )
    classes = 100 if name == "cifar100" else 10
    return TensorSet(images, labels, classes), TensorSet(test_images, test_labels, classes)
