"""Learning rates that an optimizer reads from the device, so that a captured step sees changes."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NO_SETTINGS = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group that are not settings, or that only schedulers read."""


def why_not(optimizer: Optimizer) -> str | None:
    """Why an optimizer's step cannot be captured with a changing learning rate; None if it can.

    LARS and LAMB can, torch's SGD with ``fused=True``, its others with ``capturable=True``, and any other optimizer
    whose class sets ``tensor_lr = True``: then ``group["lr"]`` may be a tensor, and a step must read no values back.
    """
    name = type(optimizer).__name__
    if getattr(optimizer, "tensor_lr", False):
        return None
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and not group["fused"]:
            return f"{name} takes its learning rate from the host; create it with fused=True"
        if "capturable" in group and not group["capturable"]:
            return f"{name} takes its learning rate from the host; create it with capturable=True"
        if not isinstance(optimizer, torch.optim.SGD) and "capturable" not in group:
            return f"{name} may not support a learning rate on the device; see conadv_lab.optim.rates.why_not"
    return None


def bind(optimizer: Optimizer, rates: Sequence[Tensor]) -> None:
    """Let each parameter group read its learning rate from a tensor, overriding its previous value."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def rates_on(optimizer: Optimizer, device: torch.device) -> list[Tensor]:
    """A float32 tensor on the device with each group's current learning rate."""
    return [
        torch.as_tensor(group["lr"], dtype=torch.float32, device="cpu").to(device)
        for group in optimizer.param_groups
    ]


def take_over(optimizer: Optimizer, rates: Sequence[Tensor]) -> None:
    """Like `bind`, but keeps a learning rate that user code has set since, as a number or its own tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is not rate:
            rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
    bind(optimizer, rates)


def settings(optimizer: Optimizer) -> Hashable:
    """All host-side settings of an optimizer's step except learning rates: a captured step would not see them change.

    Such as a momentum that a scheduler cycles, or parameters that are frozen or unfrozen during training.
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
    """An optimizer's state dict with learning rates as numbers, captured or not."""
    state = optimizer.state_dict()
    state["param_groups"] = [
        group | {"lr": float(group["lr"])} if isinstance(group.get("lr"), Tensor) else group
        for group in state["param_groups"]
    ]
    return state
