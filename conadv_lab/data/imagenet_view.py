"""From a photograph's file to a training image: decode, crop, resize, flip, policy, erasing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conadv_lab.data.crops import (
    CROP_DRAWS,
    ERASE_DRAWS,
    Box,
    centre_crop,
    crop_box,
    erased_box,
    resized_crop,
)
from conadv_lab.data.decode import Content, Decoder
from conadv_lab.data.policies import POLICY_DRAWS, autoaugment, randaugment

Policy = Literal["none", "autoaugment", "randaugment"]

DRAWS = CROP_DRAWS + 1 + POLICY_DRAWS + ERASE_DRAWS
"""How many uniform numbers each training image gets, used or not."""

_POLICY = CROP_DRAWS + 1
_ERASE = _POLICY + POLICY_DRAWS
# ImageNet's mean pixel: torchvision erases with 0 after normalisation, which equals this before it.
_MEAN = torch.tensor([124, 116, 104], dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class View:
    """How photographs become square images.

    Attributes:
        side: of the images, in pixels.
        resize: size of the short side before the centre crop of unaugmented images.
        least: smallest fraction of the area that a random crop covers.
        flip: random horizontal flip, p = 0.5.
        policy: AutoAugment or RandAugment, after crop and flip.
        erasing: probability of random erasing.
    """

    side: int
    resize: int
    least: float = 0.08
    flip: bool = True
    policy: Policy = "none"
    erasing: float = 0.0

    def as_it_is(self, content: Content, name: str, decoder: Decoder) -> Tensor:
        """(side, side, 3) uint8, centre-cropped."""
        return centre_crop(decoder(content, name), self.resize, self.side)

    def augmented(self, content: Content, name: str, decoder: Decoder, draws: Sequence[float]) -> Tensor:
        """(side, side, 3) uint8, augmented by ``draws``, `DRAWS` numbers in [0, 1)."""
        pixels = decoder(content, name)
        height, width = pixels.shape[:2]
        box = self.box(height, width, draws)
        image = resized_crop(pixels, box, self.side, self.mirrored(draws))
        if self.policy != "none":
            image = self._by_policy(image, draws[_POLICY:_ERASE])
        if self.erasing:
            image = image.clone()  # a crop of exactly this size is a view of the decoder's buffer
            self.erase(image, draws)
        return image

    def box(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """The random crop of a photograph of that size."""
        return crop_box(height, width, draws[:CROP_DRAWS], scale=(self.least, 1.0))

    def mirrored(self, draws: Sequence[float]) -> bool:
        return self.flip and draws[CROP_DRAWS] < 0.5

    def erase(self, image: Tensor, draws: Sequence[float]) -> None:
        """Random erasing of an image (side, side, 3), in place."""
        erased = erased_box(self.side, self.side, draws[_ERASE:], self.erasing)
        if erased is not None:
            top, left, height, width = erased
            image[top : top + height, left : left + width] = _MEAN

    def _by_policy(self, image: Tensor, draws: Sequence[float]) -> Tensor:
        picture = Image.fromarray(image.numpy())
        made = autoaugment(picture, draws) if self.policy == "autoaugment" else randaugment(picture, draws)
        return torch.from_numpy(np.array(made))
