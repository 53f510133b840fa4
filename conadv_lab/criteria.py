"""What a network returns, and what a criterion makes of it: which tensor is judged, and whether a loss is a mean."""

from collections.abc import Mapping
from math import isclose
from typing import Any, Literal

from torch import Tensor


def logits(outputs: Any) -> Tensor:
    """The tensor that a criterion of tensors judges: the outputs, their ``logits`` (or ``out``), or their first part.

    Raises:
        ValueError: there is none.

    >>> import torch
    >>> logits((torch.zeros(2), "features")).tolist()
    [0.0, 0.0]
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "out"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise ValueError(
        f"the model returned {type(outputs).__name__}; allowed: a tensor, a tuple that begins with one, "
        "something with .logits, or a criterion that takes it as it is"
    )


def reduction(
    once: float, doubled: float, rounding: float, least: float = 0.0
) -> Literal["mean", "sum", "other"]:
    """What a loss does with its batch, from its value on a batch and on the same batch twice.

    A mean stays as it is, a sum doubles. A loss that couples its examples, as a contrastive one, may do either or
    neither; one that is zero cannot be told from a mean.

    Args:
        rounding: relative difference that counts as equal; least: absolute one.

    >>> reduction(2.0, 2.0, 1e-3), reduction(2.0, 4.0, 1e-3), reduction(2.0, 2.7, 1e-3)
    ('mean', 'sum', 'other')
    """
    if isclose(once, doubled, rel_tol=rounding, abs_tol=least):
        return "mean"
    return "sum" if abs(doubled - 2 * once) < abs(doubled - once) else "other"
