"""Any number of random images, generated on request: for tests of scale, speed and memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from conadv_lab.data.hashing import image_keys, random_bytes, uniform
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.transfer import sent
from conadv_lab.mistakes import require


@dataclass(frozen=True)
class Synthetic:
    """Random images and labels, each a pure function of (seed, index). There is nothing to learn.

    Args:
        size: number of images, from 1 to 2³¹ − 1.
        shape: (channels, height, width).
        classes: labels are uniform in 0 … classes − 1.
        seed: sets with different seeds have different images.
        device: where the images are made.

    Raises:
        ValueError: a size, shape or class count that is not positive, or a size above the limit.

    >>> images, labels = Synthetic(size=98_304).fetch(torch.tensor([7, 98_303]))
    >>> images.shape, images.dtype, labels.dtype
    (torch.Size([2, 3, 32, 32]), torch.uint8, torch.int64)
    """

    size: int
    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 10
    seed: int = 0
    device: torch.device | str = "cpu"
    resident = True

    def __post_init__(self) -> None:
        require(1 <= self.size < 2**31, "size", self.size, "a whole number from 1 to 2147483647")
        good = len(self.shape) == 3 and min(self.shape) >= 1
        require(good, "shape", self.shape, "(channels, height, width), each at least 1")
        require(self.classes >= 1, "classes", self.classes, "a whole number of at least 1")

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 and labels (B,) int64 of indices (B,), on the set's device.

        Raises:
            ValueError: an index outside 0 … size − 1.
        """
        on_host = not indices.is_cuda  # checking values on a GPU would synchronise the host
        if on_host and len(indices) and (indices.min() < 0 or indices.max() >= self.size):
            raise ValueError(
                f"indices range from {indices.min()} to {indices.max()}; allowed: 0 to {self.size - 1}"
            )
        indices = sent(indices, torch.device(self.device))
        whole = torch.zeros((), dtype=torch.int64, device=indices.device)
        channels, height, width = self.shape
        pixels = random_bytes(image_keys(self.seed, "pixels", whole, indices), channels * height * width)
        draws = uniform(image_keys(self.seed, "labels", whole, indices), 1)[:, 0]
        return pixels.view(-1, *self.shape), (draws * self.classes).floor().long()


def synthetic_sets(section: Data, demand: Demand, device: torch.device) -> tuple[Synthetic, Synthetic]:
    shape = (3, section.synthetic_pixels, section.synthetic_pixels)
    made = Synthetic(section.synthetic_images, shape, device=device)
    return made, Synthetic(1_000, shape, seed=1, device=device)
