"""Small photographs made for tests: smooth enough for JPEG, different in every pixel."""

import io

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of waves, edges and a little noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / draw.uniform(3, 15) + y / draw.uniform(3, 15) + channel) for channel in range(3)]
    pixels = 128 + 80 * np.stack(waves, -1) + draw.normal(0, 4, (height, width, 3))
    pixels[y > height * draw.uniform(0.5, 0.9)] *= 0.6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The image as the content of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
