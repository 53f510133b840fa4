"""Adaptive gradient clipping (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization",
ICML 2021, arXiv 2102.06171, equation 3)."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab.mistakes import require
from conadv_lab.optim.tensors import with_gradients

_SMALLEST_NORM = 1e-6


@torch.no_grad()
def clip_adaptively(params: Iterable[Tensor], factor: float = 0.01, eps: float = 1e-3) -> None:
    """Clip each unit's gradient norm, in place, to at most ``factor`` times the norm of its weight.

    A unit is an output of a layer: with W_i and G_i the rows of a weight and its gradient for output i,

        G_i ← G_i · min(1, factor · max(‖W_i‖, eps) / ‖G_i‖)

    A tensor with at most one dimension is one unit. As in timm, each gain of a standardised convolution, of shape
    (O, 1, 1, 1), is a unit. Never synchronises; non-finite gradients stay non-finite.

    Args:
        params: their ``.grad``, if any, is clipped: the whole step's, already summed over ranks.
        factor: λ, above 0.
        eps: lower bound of a weight's norm, above 0, so that weights that start at zero can learn.

    Raises:
        ValueError: an argument outside its range, or a sparse gradient.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> weight.grad = torch.ones(2, 2)
    >>> clip_adaptively([weight], factor=0.1)
    >>> weight.grad.norm(dim=1)  # 0.1 × 5 and 0.1 × 0.001
    tensor([5.0000e-01, 1.0000e-04])
    """
    require(factor > 0, "factor", factor, "a number above 0")
    require(eps > 0, "eps", eps, "a number above 0")
    for own, grads in with_gradients(params):
        limits = [_unit_norms(param) for param in own]
        torch._foreach_clamp_min_(limits, eps)
        torch._foreach_mul_(limits, factor)
        lengths = [_unit_norms(grad) for grad in grads]
        torch._foreach_clamp_min_(lengths, _SMALLEST_NORM)  # 0 / 0 would be NaN
        torch._foreach_div_(limits, lengths)
        torch._foreach_clamp_max_(limits, 1.0)
        for grad, scale in zip(grads, limits, strict=True):
            grad.mul_(scale)


def clip_before_steps(optimizer: Optimizer, model: nn.Module, factor: float, eps: float = 1e-3) -> None:
    """Run `clip_adaptively` before every step of an optimizer, on the parameters that it updates.

    The model's last linear layer is not clipped, as in the paper (section 4.1).
    """
    require(factor > 0, "factor", factor, "a number above 0")
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    spared = {id(param) for param in linear[-1].parameters()} if linear else set()
    optimizer.register_step_pre_hook(partial(_clip, spared, factor, eps))


def _clip(spared: set[int], factor: float, eps: float, optimizer: Optimizer, *_: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in spared]
    clip_adaptively(params, factor, eps)


def _unit_norms(tensor: Tensor) -> Tensor:
    """(O, 1, …) for (O, I, …), or () for at most one dimension; at least float32, and always a new tensor."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor.detach(), dim=dims, keepdim=tensor.ndim > 1, dtype=dtype)
