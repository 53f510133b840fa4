"""Second derivatives that PyTorch gets wrong or lacks: replaced by other operations, or refused by name.

``torch._weight_norm`` runs a fused kernel whose backward pass treats ‖v‖ as a constant when it is differentiated
again (``_weight_norm_differentiable_backward`` uses the saved norms), so the Hessian in v is wrong and not even
symmetric. ``F.hardsigmoid`` has a backward pass without a derivative.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conadv_lab.sharpness.operators import bags


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    return _weight_norm(v, g, dim), torch.norm_except_dim(v, 2, dim)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return input.add_(3).clamp_(0, 6).div_(6) if inplace else F.relu6(input + 3) / 6


CURES: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    torch._weight_norm_interface: _weight_norm_interface,
    F.hardsigmoid: _hardsigmoid,
    F.embedding_bag: bags.embedding_bag,
    F.ctc_loss: bags.ctc_loss,
}
"""Replacements by the function that a model calls."""

_MISSING = (
    re.compile(r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward)?'? is not implemented"),
    re.compile(r"(once_differentiable)"),
    re.compile(r"(functions with out=\.\.\. arguments) don't support automatic differentiation"),
)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Context in which a missing second derivative raises a one-sentence error that names the operation.

    Raises:
        ValueError: instead of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        for pattern in _MISSING:
            if found := pattern.search(str(error)):
                raise ValueError(
                    f"no second derivative of {found[1]}, which the model or its loss uses; replace it, "
                    "or choose measures without a Hessian, such as sam_worst"
                ) from error
        raise
