"""Batch norm statistics over several ranks, with any backend of torch.distributed.

`torch.nn.SyncBatchNorm` takes CUDA tensors only, but our tests compare results on a CPU.
"""

from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conadv_lab.outside import outside


def synchronised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each rank's slice (b, C, …) of a batch by the statistics of the whole batch.

    All ranks of the group must call it, and its backward pass, equally often and in the same order.

    Returns:
        the normalised slice, and mean (C,) and unbiased variance (C,) of the whole batch.
    """
    y, mean, var = _Synchronised.apply(x, weight, bias, eps, group)
    return y, mean, var


@torch.no_grad()
def average_over_ranks(averages: list[tuple[int, list[Tensor]]], group: Any) -> None:
    """Replace each rank's averages by averages over all ranks, with one all-reduce.

    Args:
        averages: (number of parts on this rank, tensors averaged over them); the same on all ranks except for the
            numbers.
    """
    tensors = [tensor for _, some in averages for tensor in some]
    numbers = [float(count) for count, some in averages for _ in some]
    sizes = [tensor.numel() for tensor in tensors]
    total = sum(sizes)
    weighted = [part.flatten() for part in torch._foreach_mul(tensors, numbers)]
    # One count per element, so that one division suffices; filled on the device, as copying from a list would
    # synchronise.
    runs = groupby(zip(numbers, sizes, strict=True), key=lambda pair: pair[0])
    weights = [tensors[0].new_full((sum(size for _, size in run),), number) for number, run in runs]
    sums = torch.cat([*weighted, *weights])
    outside(partial(dist.all_reduce, sums, group=group))
    means = (sums[:total] / sums[total:]).split(sizes)
    torch._foreach_copy_(tensors, [mean.view_as(t) for mean, t in zip(means, tensors, strict=True)])


class _Synchronised(torch.autograd.Function):
    """Statistics are combined from each slice's count, mean and squared deviations (Chan et al. 1979).

    Sums of squares would lose precision for a variance that is small compared with the mean. The backward pass is the
    ordinary batch norm's with its two means taken over all ranks; weights and biases get their own slice's gradient,
    like every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> Any:
        kept = torch.promote_types(x.dtype, torch.float32)
        count, wide = x.numel() // x.shape[1], x.to(kept)
        var, mean = torch.var_mean(wide, _but_channels(x), correction=0)
        mine = torch.cat([mean, var, mean.new_full((1,), count)])
        slices = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slices, mine, group=group)
        means, variances, counts = torch.stack(slices).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
        inverse = torch.rsqrt(var + eps)
        normalised = (wide - _wide(mean, x)) * _wide(inverse, x)
        y = normalised
        if weight is not None and bias is not None:
            y = y * _wide(weight.to(kept), x) + _wide(bias.to(kept), x)
        ctx.save_for_backward(normalised, inverse, weight, total)
        ctx.group = group
        unbiased = var * (total / (total - 1).clamp_min(1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        normalised, inverse, weight, total = ctx.saved_tensors
        dy, kept = gradients[0].to(normalised.dtype), normalised.dtype
        sums = torch.stack([dy.sum(_but_channels(dy)), (dy * normalised).sum(_but_channels(dy))])
        own = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        over_all = sums / total
        dx = (dy - _wide(over_all[0], dy) - normalised * _wide(over_all[1], dy)) * _wide(inverse, dy)
        if weight is None:
            return dx.to(gradients[0].dtype), None, None, None, None
        dx = dx * _wide(weight.to(kept), dy)
        return dx.to(gradients[0].dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


def _but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(C,) reshaped to broadcast over (b, C, …)."""
    return values.view(1, -1, *[1] * (like.ndim - 2))
