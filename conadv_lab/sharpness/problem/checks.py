"""Checks of a model, its loss and its data before measuring; each error is one sentence."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conadv_lab.criteria import reduction
from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.problem.nests import first_tensor, take


def reusable(batches: Any) -> Any:
    """Batches that can be iterated repeatedly: a pair or mapping is one batch, an iterator is read into a list."""
    pair = isinstance(batches, tuple) and len(batches) == 2
    if pair and all(isinstance(part, (tuple, list)) for part in batches):  # two batches
        pair = False
    if pair or isinstance(batches, Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is {type(batches).__name__}; allowed: a list or loader of (inputs, targets)"
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def chosen_names(
    model: nn.Module, tensors: Mapping[str, Tensor], params: Sequence[str] | None
) -> tuple[str, ...]:
    """The names of the parameters selected by their own names or their modules'."""
    if params is None:
        names = tuple(name for name, tensor in tensors.items() if tensor.requires_grad)
        require(
            bool(names), "params", params, "explicit names, as no parameter of the model requires a gradient"
        )
        return names
    params = [params] if isinstance(params, str) else list(params)
    require(bool(params), "params", params, "at least one name of a parameter or module")
    modules = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    wanted: set[str] = set()
    for asked in params:
        found = [name for name in tensors if name == asked or name.startswith(asked + ".")]
        if not found:
            raise unknown("parameter", asked, [*tensors, *modules])
        wanted.update(found)
    return tuple(name for name in tensors if name in wanted)


def check_labels(output: Tensor, targets: Any, criterion: Any, index: int) -> None:
    """Reject class labels beyond the outputs' classes, which would abort the process on a GPU.

    Only for criteria known to have the classes on axis 1: a custom one may have them elsewhere.
    """
    if not isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and criterion not in (
        F.cross_entropy, F.nll_loss,
    ):  # fmt: skip
        return
    whole = isinstance(targets, Tensor) and targets.dtype in (torch.int64, torch.int32, torch.uint8)
    if not whole or output.ndim != targets.ndim + 1 or targets.numel() == 0:
        return
    kept = targets[targets != getattr(criterion, "ignore_index", -100)]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= output.shape[1]):
        worst = int(kept.max()) if int(kept.max()) >= output.shape[1] else int(kept.min())
        raise ValueError(
            f"label {worst} in batch {index}; allowed: 0 to {output.shape[1] - 1}, the outputs' classes"
        )


def check_shape(loss: Any) -> None:
    """The loss must be one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the criterion returned {shape}; allowed: one number, the mean over the batch")


def check_loss(loss: Tensor, index: int) -> None:
    """The loss must be a finite number."""
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of batch {index} is {float(loss.detach())}; allowed: a finite number")


def check_mean(loss: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> None:
    """Reject a sum. `means.Mean` detects a mean over anything but examples."""
    first = first_tensor(inputs)
    index = torch.arange(min(8, first.shape[0]), device=first.device)
    twice = torch.cat([index, index])
    with torch.no_grad():
        once = float(loss(take(inputs, index), take(targets, index)))
        double = float(loss(take(inputs, twice), take(targets, twice)))
    if reduction(once, double, rounding=1e-3) == "sum":
        raise ValueError(
            f"the criterion sums over the batch (loss {once:.4g} on {len(index)} examples, {double:.4g} "
            "on the same examples twice); allowed: the mean, as with reduction='mean'"
        )
