"""Decodes photographs: simplejpeg if it is installed, Pillow for everything else.

Both give the same pixels, so a run does not depend on which is installed. ImageNet's irregular files are handled as
follows; anything else raises an error that names the file:

    greyscale            three equal channels
    CMYK, YCCK           Pillow's conversion to RGB
    PNG named .JPEG      decoded by content; transparency is dropped, as in Pillow's conversion to RGB
    EXIF orientation     ignored, as ImageNet's usual loaders do (torchvision, timm, DALI), so that crops agree
    16-bit grey          the upper eight bits, as Pillow does for 16-bit colour; its conversion to RGB would clip
    32 bits, floats      refused, as the white level is unknown; so is 16-bit grey in formats other than PNG and PGM
    truncated            refused: "cannot be decoded: image file is truncated"
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # the extra "fast" is not installed
    simplejpeg = None

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Content = bytes | memoryview
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


def jpeg_size(content: Content) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder renders alike, from its header alone; None for other files.

    Such a JPEG is greyscale or YCbCr and has nothing after its image. Files that return None may still be images:
    CMYK, RGB, several pictures in one file, or truncated.

    >>> file = io.BytesIO()
    >>> Image.new("L", (4, 3), 200).save(file, "JPEG")
    >>> jpeg_size(file.getvalue()), jpeg_size(file.getvalue()[:-2])
    ((3, 4), None)
    """
    if content[:3] != _JPEG or content[-2:] != _JPEG_END:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                usual = image.format == "JPEG" and image.mode in ("L", "RGB")
                usual &= image.info.get("adobe_transform") != 0  # 0: the channels are RGB
                return (image.height, image.width) if usual else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


class Decoder:
    """Decodes images into a buffer that it reuses: allocating one per image would cost a tenth of the time.

    >>> file = io.BytesIO()
    >>> Image.new("L", (4, 3), 200).save(file, "PNG")
    >>> pixels = Decoder()(file.getvalue(), "grey.JPEG")
    >>> pixels.shape, int(pixels[0, 0, 2])
    ((3, 4, 3), 200)
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, content: Content, name: str) -> Pixels:
        """The pixels, (H, W, 3) uint8 RGB, valid until the next call.

        Args:
            content: the whole file.
            name: of the file, for messages.

        Raises:
            ValueError: the content is not an image, or is broken.
        """
        if simplejpeg is not None and content[:3] == _JPEG:
            try:
                return self._fast(content)
            except ValueError:
                pass  # another colour space or an irregular file: leave it to Pillow
        return decode_with_pillow(content, name)

    def _fast(self, content: Content) -> Pixels:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if space not in ("YCbCr", "RGB", "Gray"):
            raise ValueError(space)
        if self._memory.size < height * width * 3:
            self._memory = np.empty(height * width * 3, np.uint8)
        return simplejpeg.decode_jpeg(content, "RGB", buffer=self._memory)


def decode_with_pillow(content: Content, name: str) -> Pixels:
    """Like `Decoder`, with Pillow only.

    Raises:
        ValueError: the content is not an image, or is broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks and palettes do not affect pixels
            with Image.open(io.BytesIO(content)) as image:
                return _rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image format that Pillow can read" if "cannot identify" in str(error) else str(error)
        raise ValueError(f"{name} cannot be decoded: {reason or 'broken file'}") from None


def _rgb(image: Image.Image) -> Pixels:
    """Raise ``ValueError`` where Pillow's conversion would clip and not rescale."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return np.array(image.convert("RGB"))
    if image.format not in ("PNG", "PPM") or image.mode == "F":
        raise ValueError(
            f"it is a {image.format} of mode {image.mode}, whose white level is unknown; allowed: 8 bits per "
            "channel, or a 16-bit PNG"
        )
    grey = (np.array(image) >> 8).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
