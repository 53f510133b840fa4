"""Decoded pixels are Pillow's, whatever the file turns out to be; what cannot be decoded is named."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conadv_lab.data import decode
from conadv_lab.data.decode import Decoder, decode_with_pillow
from tests.data.photos import encoded, photo


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


FILES = {
    "4:2:0": lambda: encoded(photo(61, 47), quality=85, subsampling=2),
    "4:4:4": lambda: encoded(photo(64, 80), quality=97, subsampling=0),
    "progressive": lambda: encoded(photo(40, 33), progressive=True),
    "grey": lambda: encoded(photo(30, 41).convert("L")),
    "CMYK": lambda: encoded(photo(33, 20).convert("CMYK")),
    "PNG": lambda: encoded(photo(20, 31), "PNG"),
    "PNG with a palette": lambda: encoded(photo(20, 31).quantize(16), "PNG"),
    "PNG with transparency": lambda: encoded(photo(20, 31).convert("RGBA"), "PNG"),
    "GIF": lambda: encoded(photo(20, 31).convert("L"), "GIF"),
    "bytes after the end": lambda: encoded(photo(20, 31)) + b"\0" * 100,
    "one pixel": lambda: encoded(photo(1, 1)),
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_pillows(kind):
    content = FILES[kind]()
    pixels = Decoder()(content, "n01440764_10026.JPEG")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, by_pillow(content))


@pytest.mark.parametrize("kind", FILES)
def test_without_simplejpeg_nothing_changes(kind, monkeypatch):
    content = FILES[kind]()
    fast = Decoder()(content, "x").copy()
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(Decoder()(content, "x"), fast)


def test_memory_is_kept_from_image_to_image():
    if decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed (extra fast)")
    decoder = Decoder()
    large, small = encoded(photo(50, 60)), encoded(photo(20, 10))
    first = decoder(large, "a")
    second = decoder(small, "b")
    np.testing.assert_array_equal(second, by_pillow(small))
    assert np.shares_memory(first, second)


def test_exif_orientation_is_ignored():
    image = photo(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    turned = encoded(image, exif=exif.tobytes())
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(Decoder()(turned, "x"), Decoder()(encoded(image), "x"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["4:2:0", "PNG", "progressive", "CMYK"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_truncated_file_is_named_in_one_sentence(kind, share, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    content = FILES[kind]()
    with pytest.raises(ValueError, match=r"^n01440764_10026\.JPEG cannot be decoded: ") as error:
        Decoder()(content[: int(share * len(content))], "n01440764_10026.JPEG")
    assert "\n" not in str(error.value)
    assert "BytesIO" not in str(error.value)


def test_text_is_no_image():
    with pytest.raises(
        ValueError, match=r"a\.JPEG cannot be decoded: not an image format that Pillow can read"
    ):
        decode_with_pillow(b"<html>404</html>", "a.JPEG")


GREY = (np.arange(20 * 31).reshape(20, 31) * 104).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_as_those_of_colour_are(kind):
    """Pillow's conversion to RGB takes everything above 255 for white."""
    pixels = Decoder()(encoded(Image.fromarray(GREY), kind), "scan.png")
    assert pixels.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], GREY // 256)


@pytest.mark.parametrize("values", [GREY, GREY.astype(np.int32), (GREY / 65535).astype(np.float32)])
def test_an_image_that_does_not_say_what_is_white_is_refused_by_name(values):
    content = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(ValueError, match=r"^scan\.tif cannot be decoded: it is a TIFF of mode .*white level"):
        Decoder()(content, "scan.tif")


MODES = ["1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_white_is_white_and_black_is_black_in_every_mode(mode):
    """Whatever a file may be opened as: right to a rounding, or refused."""
    of_16_bits = {"I": 65535, "I;16": 65535, "I;16B": 65535}
    white = of_16_bits | {"F": 1.0, "CMYK": (0, 0, 0, 0), "HSV": (0, 0, 255)}
    white |= {"YCbCr": (255, 128, 128), "LAB": (255, 128, 128)}
    black = {"CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "LAB": (0, 128, 128)}
    bands = len(Image.new(mode, (1, 1)).getbands())
    for colours, expected, other in ((white, 255, (255,) * bands), (black, 0, (0,) * bands)):
        image = Image.new(mode, (1, 1), colours.get(mode, other if bands > 1 else other[0]))
        image.format = "PNG"
        if mode == "F":
            with pytest.raises(ValueError, match="mode F"):
                decode._rgb(image)
        else:
            assert abs(decode._rgb(image).astype(int) - expected).max() <= 1


def test_real_photographs():
    folder = os.environ.get("CONADV_PHOTOS")
    if not folder:
        pytest.skip("CONADV_PHOTOS names no folder of photographs")
    paths = sorted(Path(folder).rglob("*.JPEG"))
    assert paths
    decoder = Decoder()
    for path in paths:
        content = path.read_bytes()
        np.testing.assert_array_equal(decoder(content, path.name), by_pillow(content))
