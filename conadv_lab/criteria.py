"""Which output of a network a criterion takes, and whether a loss is a mean over examples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isclose
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def logits(outputs: Any) -> Tensor:
    """The tensor to pass to a criterion: the outputs, their ``logits`` (or ``out``), or their first element.

    Raises:
        ValueError: there is no such tensor.

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
        f"the model returned {type(outputs).__name__}; allowed: a tensor, a tuple that starts with one, "
        "an object with .logits, or a criterion that accepts this type"
    )


def kinds(data: Any) -> str:
    """Dtype and shape of each tensor.

    >>> import torch
    >>> kinds((torch.zeros(2, 3), torch.zeros(2).long()))
    'float32 (2, 3), int64 (2,)'
    """
    tensors = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn an error of torch, such as for a wrong shape or dtype, into a ``ValueError`` that says what was given."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{what}: {str(error).partition(chr(10))[0]}") from error


def reduction(
    once: float, doubled: float, rounding: float, least: float = 0.0
) -> Literal["mean", "sum", "other"]:
    """How a loss reduces its batch, from its value on a batch and on the same batch repeated twice.

    A mean stays the same, a sum doubles. A loss that couples its examples, such as a contrastive one, may do either or
    neither; a zero loss looks like a mean.

    Args:
        rounding: relative difference that counts as equal; least: absolute difference.

    >>> reduction(2.0, 2.0, 1e-3), reduction(2.0, 4.0, 1e-3), reduction(2.0, 2.7, 1e-3)
    ('mean', 'sum', 'other')
    """
    if isclose(once, doubled, rel_tol=rounding, abs_tol=least):
        return "mean"
    return "sum" if abs(doubled - 2 * once) < abs(doubled - once) else "other"
