"""Random resized crops and centre crops of one photograph, as torchvision defines them.

The crop box is a function of uniform numbers in [0, 1) that the caller supplies.
"""

from collections.abc import Sequence
from math import exp, log, sqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from conadv_lab.data.decode import Pixels

Box = tuple[int, int, int, int]
"""Top, left, height, width."""

ATTEMPTS = 10
CROP_DRAWS = 4 * ATTEMPTS
ERASE_DRAWS = 1 + 4 * ATTEMPTS


def crop_box(
    height: int,
    width: int,
    draws: Sequence[float],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """The box of a random resized crop (Szegedy et al. 2015, section 6; torchvision's RandomResizedCrop).

    Up to ten attempts sample an area fraction from ``scale`` and, log-uniformly, an aspect ratio; the first box
    that fits into the image is placed uniformly. If none fits, the central box of the nearest allowed ratio is used.

    Args:
        height, width: of the image.
        draws: 40 numbers in [0, 1), four per attempt: area, ratio, top, left.
        scale: range of the fraction of the area.
        ratio: width over height.

    >>> crop_box(200, 200, [0.5, 0.5, 0.0, 0.99] + [0.5] * 36)
    (0, 53, 147, 147)
    """
    for attempt in range(ATTEMPTS):
        of_area, of_ratio, of_top, of_left = draws[4 * attempt : 4 * attempt + 4]
        area = height * width * _between(scale, of_area)
        aspect = exp(_between((log(ratio[0]), log(ratio[1])), of_ratio))
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return _place(height - h, of_top), _place(width - w, of_left), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def erased_box(
    height: int,
    width: int,
    draws: Sequence[float],
    probability: float,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Box | None:
    """The box that random erasing blanks (Zhong et al. 2020, algorithm 1; torchvision's RandomErasing), or None.

    Args:
        height, width: of the image.
        draws: 41 numbers in [0, 1): whether to erase, then ten attempts of area, ratio, top, left.
        probability: of erasing.
        scale: range of the fraction of the area.
        ratio: height over width, log-uniform.
    """
    if draws[0] >= probability:
        return None
    for attempt in range(ATTEMPTS):
        of_area, of_ratio, of_top, of_left = draws[1 + 4 * attempt : 5 + 4 * attempt]
        area = height * width * _between(scale, of_area)
        aspect = exp(_between((log(ratio[0]), log(ratio[1])), of_ratio))
        h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if h < height and w < width:
            return _place(height - h, of_top), _place(width - w, of_left), h, w
    return None


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _place(room: int, draw: float) -> int:
    return int(draw * (room + 1))


def resized_crop(pixels: Pixels, box: Box, side: int, mirrored: bool = False) -> Tensor:
    """A box of (H, W, 3) uint8 pixels, resized to (side, side, 3) uint8, optionally flipped horizontally.

    Bilinear with antialiasing, in 8-bit arithmetic: torchvision's resize of tensors. Pillow's resize rounds in
    another order and differs by at most 2 of 255.
    """
    top, left, height, width = box
    cut = torch.from_numpy(pixels)[top : top + height, left : left + width]
    made = _resize(cut, side, side)
    return made.flip(1) if mirrored else made


def centre_crop(pixels: Pixels, resize: int, side: int) -> Tensor:
    """Resize the short side to ``resize``, then crop the central (side, side, 3) uint8.

    Rounding is torchvision's: the long side is rounded down, the margin half to even.
    ``resize`` must be at least ``side``.
    """
    height, width = pixels.shape[:2]
    top, left, h, w = centre_place(height, width, resize, side)
    made = _resize(torch.from_numpy(pixels), h, w)
    return made[top : top + side, left : left + side]


def centre_place(height: int, width: int, resize: int, side: int) -> Box:
    """Where the square of `centre_crop` lies in the resized image, and that image's size: top, left, height, width.

    >>> centre_place(375, 500, 256, 224)
    (16, 58, 256, 341)
    """
    short, long = min(height, width), max(height, width)
    other = int(resize * long / short)
    h, w = (resize, other) if height <= width else (other, resize)
    return round((h - side) / 2), round((w - side) / 2), h, w


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.permute(2, 0, 1)[None]
    made = interpolate(planes, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return made[0].permute(1, 2, 0)
