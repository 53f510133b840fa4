"""Signs as one bit per pixel, the stored form of a pending sign attack."""

import torch
from torch import Tensor


def pack(values: Tensor) -> Tensor:
    """The signs of (B, …) as (B, ⌈P / 8⌉) uint8, with P values per image; zero counts as positive.

    >>> pack(torch.tensor([[1.0, -2.0, 0.0]])).tolist()
    [[5]]
    """
    positive = (values >= 0).flatten(1).view(torch.uint8)
    spare = -positive.shape[1] % 8
    if spare:
        positive = torch.nn.functional.pad(positive, (0, spare))
    columns = positive.view(len(positive), -1, 8)
    packed = columns[..., 0].clone()
    for bit in range(1, 8):
        packed |= columns[..., bit] << bit
    return packed


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """±1 in the shape and dtype of ``like`` (B, …) from its packed signs.

    >>> unpack(torch.tensor([[5]], dtype=torch.uint8), torch.zeros(1, 3)).tolist()
    [[1.0, -1.0, 1.0]]
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    positive = ((packed.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : like[0].numel()]
    return positive.to(like.dtype).mul_(2).sub_(1).view(like.shape)
