"""The network that a method calls: the model itself, compiled or under autocast where asked."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from conadv_lab.models.options import GRAPH_MODES, Model


def network_of(model: nn.Module, section: Model, device: torch.device) -> nn.Module:
    """A module that shares the model's weights and runs as the config's section says.

    With a mode of torch.compile's that replays CUDA graphs, `begin_step` must be called at the start of every step.
    Each micro-batch of a step is then captured for itself, as gradients gather over all of them: it is meant for
    few. Not measured.
    """
    network = Autocast(model, device.type) if section.precision == "bfloat16" else model
    return torch.compile(network, mode=section.compile_mode) if section.compile else network  # type: ignore[return-value]


def begin_step(section: Model) -> None:
    """Tell compiled CUDA graphs that nothing they gave in the step before is read any more.

    Left to itself, torch takes each forward for the start of a step, and would write over the gradients of the one
    before it. What a method keeps from step to step is never a network's own output or gradient, but made from it.
    """
    if section.compile and section.compile_mode in GRAPH_MODES:
        torch.compiler.cudagraph_mark_step_begin()


class Autocast(nn.Module):
    """Runs a network's forward in bfloat16 where that is safe, and gives its outputs in float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            outputs = self.network(images)
            return outputs.float() if isinstance(outputs, Tensor) else tree_map(_as_float, outputs)


def _as_float(part: Any) -> Any:
    return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part
