"""Momentum that starts with a parameter's first gradient, for torch's SGD on a GPU."""

from typing import Any

import torch
from torch.optim import Optimizer


def begin_momenta(optimizer: Optimizer, *_: Any) -> None:
    """A hook before each step of torch's fused SGD, which cannot start one parameter's momentum later than another's.

    It raises a TypeError in that case, and the norms of the adversarial branch have no gradient before the first step
    that trains on altered images. Starting the momentum at 0 is equivalent to starting it with the gradient.

    >>> weight, later = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    >>> optimizer = torch.optim.SGD([weight, later], lr=0.1, momentum=0.9, fused=True)
    >>> handle = optimizer.register_step_pre_hook(begin_momenta)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.step()
    >>> later.grad = torch.ones(1)
    >>> optimizer.step()
    >>> [round(parameter.item(), 6) for parameter in (weight, later)]  # 1 - 0.1 - 0.19, 1 - 0.1
    [0.71, 0.9]
    """
    for group in optimizer.param_groups:
        # Not with dampening, as torch does not dampen the first gradient.
        for parameter in group["params"] if group["momentum"] and not group["dampening"] else ():
            if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
