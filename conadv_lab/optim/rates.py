"""Learning rates that an optimizer reads from the device, so that a captured step sees them change."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NO_SETTINGS = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
"""Of a parameter group: what is not a setting, or what only schedulers read."""


def why_not(optimizer: Optimizer) -> str | None:
    """Why an optimizer's step cannot be captured with a learning rate that changes; None where it can.

    LARS and LAMB can, torch's SGD with ``fused=True``, its others with ``capturable=True``, and any other optimizer
    whose class says ``tensor_lr = True``: that ``group["lr"]`` may be a tensor, and that a step reads nothing back.
    """
    name = type(optimizer).__name__
    if getattr(optimizer, "tensor_lr", False):
        return None
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and not group["fused"]:
            return f"{name} takes its learning rate from the host; make it with fused=True"
        if "capturable" in group and not group["capturable"]:
            return f"{name} takes its learning rate from the host; make it with capturable=True"
        if not isinstance(optimizer, torch.optim.SGD) and "capturable" not in group:
            return f"{name} is not known to take its learning rate from the device; see conadv_lab.optim.rates.why_not"
    return None


def bind(optimizer: Optimizer, rates: Sequence[Tensor]) -> None:
    """Let each parameter group read its learning rate from a tensor, whatever it had before."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def rates_on(optimizer: Optimizer, device: torch.device) -> list[Tensor]:
    """A tensor on the device for each group's learning rate, with the value that it has: float32, as torch wants it."""
    return [
        torch.as_tensor(group["lr"], dtype=torch.float32, device="cpu").to(device)
        for group in optimizer.param_groups
    ]


def take_over(optimizer: Optimizer, rates: Sequence[Tensor]) -> None:
    """As `bind`, but a learning rate that user code has set since, as a number or a tensor of its own, is kept."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is not rate:
            rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
    bind(optimizer, rates)


def settings(optimizer: Optimizer) -> Hashable:
    """All but the learning rates that the host decides of an optimizer's step: a captured one would not see it change.

    Such as a momentum that a scheduler cycles, or weights that are frozen or thawed in the course of a training.
    """
    return tuple(
        (
            tuple([parameter.requires_grad for parameter in group["params"]]),
            # A tensor may change in place, which is seen.
            *(
                (n, id(v) if isinstance(v, Tensor) else repr(v))
                for n, v in group.items()
                if n not in NO_SETTINGS
            ),
        )
        for group in optimizer.param_groups
    )


def plain_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with learning rates as numbers, whether it is captured or not."""
    state = optimizer.state_dict()
    state["param_groups"] = [
        group | {"lr": float(group["lr"])} if isinstance(group.get("lr"), Tensor) else group
        for group in state["param_groups"]
    ]
    return state
