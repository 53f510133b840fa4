"""AutoAugment's ImageNet policy and RandAugment on one image at a time, as torchvision defines them.

Operations are Pillow's, as torchvision uses on Pillow images. Geometric ones take the nearest pixel and fill with
black, torchvision's default. All random choices are functions of uniform numbers in [0, 1) from the caller.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import floor

import torch
from PIL import Image, ImageEnhance, ImageOps

_NEAREST, _AFFINE = Image.Resampling.NEAREST, Image.Transform.AFFINE
_BLACK = (0, 0, 0)


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Pixel (x, y) of the result is pixel (ax + by + c, dx + ey + f) of the image."""
    return image.transform(image.size, _AFFINE, matrix, _NEAREST, fillcolor=_BLACK)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "shear-x": lambda image, m: _moved(image, (1, m, 0, 0, 1, 0)),
    "shear-y": lambda image, m: _moved(image, (1, 0, 0, m, 1, 0)),
    "translate-x": lambda image, m: _moved(image, (1, 0, -int(m), 0, 1, 0)),
    "translate-y": lambda image, m: _moved(image, (1, 0, 0, 0, 1, -int(m))),
    "rotate": lambda image, m: image.rotate(m, _NEAREST, fillcolor=_BLACK),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "solarize": lambda image, m: ImageOps.solarize(image, m),  # type: ignore[arg-type]  # any number compares
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
}
"""Each takes an RGB image and a magnitude in its own unit: shear factor, pixels, degrees, change of a factor, bits
to keep, threshold."""

SIGNED = {"shear-x", "shear-y", "translate-x", "translate-y", "rotate"} | {
    "brightness", "color", "contrast", "sharpness"
}  # fmt: skip

RANDAUGMENT = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness",
    "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""Cubuk et al. 2020, section 3 (arXiv 1909.13719)."""

Operation = tuple[str, float, int]
"""Name, probability, magnitude of 0 to 9."""

AUTOAUGMENT: tuple[tuple[Operation, Operation], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear-x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
"""Cubuk et al. 2019, table 9 (arXiv 1805.09501)."""

POLICY_DRAWS = 6


def magnitude(name: str, level: int, bins: int, width: int, height: int) -> float:
    """The magnitude of an operation at one of ``bins`` levels, counted from 0, in the operation's own unit.

    >>> magnitude("rotate", 9, 10, 224, 224), magnitude("posterize", 8, 10, 224, 224)
    (30.0, 4)
    """
    if name == "posterize":
        return 8 - round(level / ((bins - 1) / 4))
    if name == "solarize":
        return _evenly(255.0, 0.0, bins)[level]
    if name.startswith("translate"):
        return _evenly(0.0, 150 / 331 * (width if name.endswith("x") else height), bins)[level]
    highest = 0.3 if name.startswith("shear") else 30.0 if name == "rotate" else 0.9
    return _evenly(0.0, highest, bins)[level]


@lru_cache(maxsize=64)
def _evenly(first: float, last: float, bins: int) -> tuple[float, ...]:
    """As torchvision computes it: a threshold of 169.99998 instead of 170 would change a whole grey level."""
    return tuple(torch.linspace(first, last, bins, device="cpu").tolist())


def autoaugment(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Apply one of the 25 pairs of operations, each operation with its own probability.

    Args:
        image: RGB.
        draws: 5 numbers in [0, 1): the pair, whether to apply each operation, the sign of each.
    """
    pair = AUTOAUGMENT[floor(draws[0] * len(AUTOAUGMENT))]
    for (name, probability, level), whether, sign in zip(pair, draws[1:3], draws[3:5], strict=True):
        if whether <= probability:
            image = _applied(image, name, level, 10, sign)
    return image


def randaugment(image: Image.Image, draws: Sequence[float], level: int = 9, bins: int = 31) -> Image.Image:
    """Apply two operations in sequence, each chosen uniformly from `RANDAUGMENT`, at the same level.

    Args:
        image: RGB.
        draws: 4 numbers in [0, 1): for each operation, which one and its sign.
        level: 0 to ``bins`` − 1.
        bins: number of levels.
    """
    for which, sign in (draws[0:2], draws[2:4]):
        image = _applied(image, RANDAUGMENT[floor(which * len(RANDAUGMENT))], level, bins, sign)
    return image


def _applied(image: Image.Image, name: str, level: int, bins: int, sign: float) -> Image.Image:
    amount = magnitude(name, level, bins, *image.size)
    return OPERATIONS[name](image, -amount if name in SIGNED and sign < 0.5 else amount)
