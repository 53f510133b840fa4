"""The stream of steps over a set, built from a config's section."""

from typing import Any

from torch import Tensor

from conadv_lab.data.augment import alternating_flips, augment
from conadv_lab.data.hashing import image_keys
from conadv_lab.data.loader import Augmentation, ImageSet, Stream
from conadv_lab.data.options import Data
from conadv_lab.data.sets import is_photographs


def stream_over(
    images: ImageSet, section: Data, *, seed: int, double: bool = False, **lengths: Any
) -> Stream:
    """A `Stream`, or a `PhotoStream` for photographs.

    Args:
        double: whether images should be float64.
        lengths: see `Stream`.
    """
    augment = augmentation(section, images, seed, double)
    if not is_photographs(images):
        return Stream(images, seed=seed, augment=augment, **lengths)
    from conadv_lab.data.imagenet_stream import PhotoStream

    return PhotoStream(images, mixup=section.mixup, seed=seed, augment=augment, **lengths)  # type: ignore[arg-type]


def augmentation(section: Data, images: ImageSet, seed: int, double: bool) -> Augmentation | None:
    """The function applied to images after they are fetched."""
    if is_photographs(images) or not (section.crop or section.flip or section.cutout):
        return (lambda images, epochs, indices: images.double()) if double else None

    def augmented(images: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        keys = image_keys(seed, "augment", epochs, indices)
        flip: bool | Tensor = section.flip
        if section.flip_rule == "alternating":
            flip = alternating_flips(seed, epochs, indices)
        images = augment(
            images, keys, crop=section.crop, flip=flip, cutout=section.cutout, padding=section.crop_padding
        )
        return images.double() if double else images

    return augmented
