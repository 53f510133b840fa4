"""Weights that any machine and any library can make again: no generator, no file."""

import math

import torch
from torch import nn


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Every parameter and statistic from a sine of its place, in sizes that keep activations of order one."""
    for number, (name, value) in enumerate(sorted(model.state_dict().items())):
        if not value.is_floating_point():
            continue
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + number).view(value.shape)
        if value.ndim > 1:
            value.copy_(wave * math.sqrt(1 / value[0].numel()))
        elif name.endswith("bn3.weight"):
            value.copy_(0.1 * wave)
        elif name.endswith(("running_var", "weight")):
            value.copy_(1 + 0.1 * wave)
        else:
            value.copy_(0.1 * wave)
