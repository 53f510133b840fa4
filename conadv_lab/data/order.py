"""The order of images: a pure function of (seed, epoch, position in the epoch).

Epochs follow one another without a gap: a batch may span two of them. So ``epochs * n`` images take
``epochs * n / batch`` steps, rounded, whether or not the batch size divides n.
"""

from functools import lru_cache

import torch
from torch import Tensor

from conadv_lab.seeds import generator


def places(seed: int, count: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Epochs and image indices at positions ``start`` … ``stop`` − 1 of an endless run over ``count`` images.

    Returns:
        (stop - start,) int64 epochs and (stop - start,) int64 indices below ``count``.

    >>> epochs, indices = places(seed=0, count=3, start=1, stop=5)
    >>> epochs.tolist(), sorted(indices.tolist()[2:])[-1] < 3
    ([0, 0, 1, 1], True)
    """
    epochs = torch.arange(start, stop, device="cpu").div(count, rounding_mode="floor")
    pieces = []
    for epoch in range(start // count, -(-stop // count)):
        first, last = max(start - epoch * count, 0), min(stop - epoch * count, count)
        pieces.append(_permutation(seed, count, epoch)[first:last])
    return epochs, torch.cat(pieces) if pieces else epochs


@lru_cache(maxsize=4)
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch), device="cpu")
