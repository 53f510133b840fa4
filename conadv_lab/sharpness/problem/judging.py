"""How a criterion is applied to a model's outputs: to one tensor or all, with its tensors on their device and dtype."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from conadv_lab.sharpness.problem.nests import to_device


class GradientWatch(TorchFunctionMode):
    """Detects whether a forward pass takes gradients itself, in ``found``."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.found = True
        return func(*args, **(kwargs or {}))


def takes_whole(criterion: Callable[..., Any], raw: Any, targets: Any) -> bool:
    """Whether a criterion accepts the model's whole output, as in a training loop.

    One that needs a tensor, like torch's losses, fails on a tuple or object.
    """
    if isinstance(raw, Tensor):
        return False
    try:
        loss = criterion(raw, targets)
    except Exception:
        return False
    return isinstance(loss, Tensor) and loss.numel() == 1


class WholeOutput:
    """Turns a criterion on nested tensors into one on a single packed tensor (examples, numbers).

    Raises:
        ValueError: a tensor's first axis does not index examples, or it cannot be packed exactly.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self.criterion = criterion
        module = isinstance(criterion, nn.Module)
        self.__name__ = type(criterion).__name__ if module else getattr(criterion, "__name__", "criterion")
        self._leaves: list[Any] = []
        self._structure: Any = None

    def pack(self, raw: Any) -> Tensor:
        """Concatenate all tensors of an output; stores their layout for the next call."""
        self._leaves, self._structure = tree_flatten(raw)
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        count = {tuple(t.shape[:1]) for t in tensors}
        if len(count) != 1 or () in count:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise ValueError(
                f"the criterion takes the whole output, of shapes {shapes or 'unknown'}; allowed: a tuple, list or "
                "mapping of tensors whose first axis indexes the examples"
            )
        kind = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
        columns = [t.flatten(1).to(kind) if t.ndim > 1 else t[:, None].to(kind) for t in tensors]
        for tensor, column in zip(tensors, columns, strict=True):
            exact = tensor.is_floating_point() or torch.equal(column.to(tensor.dtype).view_as(tensor), tensor)
            if tensor.is_complex() or not exact:
                raise ValueError(
                    f"the criterion takes the whole output, whose {tensor.dtype} values do not fit {kind}; "
                    "allowed: floating-point tensors"
                )
        return torch.cat(columns, 1)

    def __call__(self, packed: Tensor, targets: Any) -> Tensor:
        leaves, start = [], 0
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                width = leaf.shape[1:].numel()
                part = packed[:, start : start + width].reshape(len(packed), *leaf.shape[1:])
                start, leaf = start + width, part.to(leaf.dtype)
            leaves.append(leaf)
        return self.criterion(tree_unflatten(leaves, self._structure), targets)


def alongside(criterion: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of the criterion with its tensors, such as class weights, on this device and dtype."""
    if isinstance(criterion, nn.Module):
        own = [*criterion.parameters(), *criterion.buffers()]
        if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in own):
            return criterion
        return copy.deepcopy(criterion).to(device=device, dtype=dtype)
    if isinstance(criterion, partial):
        words = {key: to_device(value, device, dtype) for key, value in criterion.keywords.items()}
        return partial(criterion.func, *to_device(criterion.args, device, dtype), **words)
    return criterion
