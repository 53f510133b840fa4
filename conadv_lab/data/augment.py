"""Augmentation of whole batches on their device; each image's result is a pure function of its key."""

import torch
from torch import Tensor

from conadv_lab.data.hashing import image_keys, uniform
from conadv_lab.mistakes import require, require_count, unknown


def augment(
    images: Tensor,
    keys: Tensor,
    crop: int = 4,
    flip: bool | Tensor = True,
    cutout: int = 0,
    padding: str = "zeros",
) -> Tensor:
    """Random crop, horizontal flip and cutout, decided by each image's key: the same on CPU and CUDA, in any batch.

    Random crop and flip follow He et al. 2016 (section 4.2) for CIFAR, cutout follows DeVries and Taylor 2017
    (arXiv 1708.04552, section 3): a square around a pixel chosen anywhere in the image, so it may extend past
    the edge. Blanked pixels are 0, black, before any normalisation.

    Args:
        images: (B, C, H, W) of any dtype; not modified.
        keys: (B,) int32 from ``image_keys``, made with the epoch.
        crop: pixels of padding on each side; the crop has the image's size, so shifts are −crop … crop.
        flip: flip each image horizontally with probability ½; or (B,) bool, which images to flip.
        cutout: side of the blanked square in pixels; 0 for none.
        padding: "zeros", or "reflect" (without repeating the edge; then crop must be below H and W).

    Returns:
        (B, C, H, W), with the images' dtype and device.

    Raises:
        ValueError: a shape that does not fit, a negative crop or cutout, or an unknown padding.

    >>> from conadv_lab.data.hashing import image_keys
    >>> images = torch.arange(4, dtype=torch.uint8).expand(2, 1, 1, 4)
    >>> keys = image_keys(0, "augment", torch.tensor(0), torch.arange(2))
    >>> augment(images, keys, crop=0).flatten(1).tolist()
    [[...], [...]]
    """
    _check(images, keys, crop, cutout, padding)
    batch, _, height, width = images.shape
    shift_y, shift_x, mirror, centre_y, centre_x = uniform(keys, 5).unsqueeze(-1).unbind(1)
    y, x = (torch.arange(size, device=images.device).expand(batch, size) for size in (height, width))
    keep = None
    if cutout:
        keep = ~(_inside(y, centre_y, cutout)[:, :, None] & _inside(x, centre_x, cutout)[:, None, :])
    if flip is not False:
        mirrored = mirror >= 0.5 if flip is True else flip[:, None]
        x = torch.where(mirrored, width - 1 - x, x)
    if crop:
        y, x = (
            at + (shift * (2 * crop + 1)).floor().long() - crop for at, shift in ((y, shift_y), (x, shift_x))
        )
        if padding == "reflect":
            y, x = _reflect(y, height), _reflect(x, width)
        else:
            real = (y.eq(y.clamp(0, height - 1)))[:, :, None] & (x.eq(x.clamp(0, width - 1)))[:, None, :]
            keep = real if keep is None else keep & real
            y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    source = (y[:, :, None] * width + x[:, None, :]).flatten(1)[:, None, :]
    moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view(images.shape)
    return moved if keep is None else moved.mul_(keep[:, None])


def alternating_flips(seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """Which images to flip when each is flipped in every second epoch (K. Jordan, arXiv 2404.00498, section 3.6).

    Whether an image starts flipped is random in (seed, "flip", index), so about half are flipped in every epoch.

    Args:
        epochs, indices: (B,) int64, as for `image_keys`.

    Returns:
        (B,) bool, a pure function of the arguments.

    >>> epochs, indices = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    >>> flips = alternating_flips(0, epochs, indices).tolist()
    >>> flips[0] == flips[2] != flips[1] == flips[3]
    True
    """
    first = image_keys(seed, "flip", torch.zeros_like(epochs), indices) & 1
    return (first + epochs) % 2 == 1


def _check(images: Tensor, keys: Tensor, crop: int, cutout: int, padding: str) -> None:
    require(images.ndim == 4, "the images' shape", tuple(images.shape), "(batch, channels, height, width)")
    require(
        keys.shape == images.shape[:1],
        "the keys' shape",
        tuple(keys.shape),
        f"({len(images)},), one per image",
    )
    require_count(0, crop=crop, cutout=cutout)
    if padding not in ("zeros", "reflect"):
        raise unknown("padding", padding, ("zeros", "reflect"))
    if padding == "reflect":
        side = min(images.shape[2:])
        require(crop < side, "crop", crop, f"0 to {side - 1} with reflection of images of side {side}")


def _inside(at: Tensor, centre: Tensor, side: int) -> Tensor:
    """Whether positions (B, S) lie within a span of ``side`` pixels around floor(centre · S)."""
    first = (centre * at.shape[1]).floor().long() - side // 2
    return (at >= first) & (at < first + side)


def _reflect(at: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - at.abs()).abs()
