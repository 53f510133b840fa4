"""The network that a method calls: the model itself, compiled or under autocast if configured."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from conadv_lab.models.options import GRAPH_MODES, Model


def network_of(model: nn.Module, section: Model, device: torch.device) -> nn.Module:
    """A module that shares the model's parameters and runs as the config's section says.

    With a torch.compile mode that replays CUDA graphs, call `begin_step` at the start of every step. Each micro-batch
    of a step is then captured separately, as gradients accumulate over all of them, so use few. Not measured.
    """
    network = Autocast(model, device.type) if section.precision == "bfloat16" else model
    return torch.compile(network, mode=section.compile_mode) if section.compile else network  # type: ignore[return-value]


def begin_step(section: Model) -> None:
    """Tell compiled CUDA graphs that their outputs from the previous step are no longer needed.

    By default torch treats each forward pass as the start of a step, and would overwrite the gradients of the previous
    one. Methods never keep a network's outputs or gradients themselves from step to step, only values made from them.
    """
    if section.compile and section.compile_mode in GRAPH_MODES:
        torch.compiler.cudagraph_mark_step_begin()


class Autocast(nn.Module):
    """Runs a network's forward pass in bfloat16 where that is safe, and returns its outputs in float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            outputs = self.network(images)
            return outputs.float() if isinstance(outputs, Tensor) else tree_map(_as_float, outputs)


def _as_float(part: Any) -> Any:
    return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part
