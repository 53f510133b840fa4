"""Images kept on the device, one copy for all runs of a process."""

from functools import lru_cache

import torch

from conadv_lab.data.sets import TensorSet
from conadv_lab.data.synthetic import Synthetic


@lru_cache(maxsize=1)
def device_images(count: int, pixels: int, device: torch.device) -> TensorSet:
    """Random uint8 images (count, 3, pixels, pixels) of 1,000 classes."""
    source = Synthetic(count, (3, pixels, pixels), classes=1000, device=device)
    return TensorSet(*source.fetch(torch.arange(count)), source.classes)
