"""The network that a method calls: the model itself, compiled or under autocast where asked."""

import torch
from torch import Tensor, nn

from conadv_lab.config import Model


def network_of(model: nn.Module, section: Model, device: torch.device) -> nn.Module:
    """A module that shares the model's weights and runs as the config's section says."""
    network = Autocast(model, device.type) if section.precision == "bfloat16" else model
    return torch.compile(network) if section.compile else network  # type: ignore[return-value]


class Autocast(nn.Module):
    """Runs a network's forward in bfloat16 where that is safe, and gives its outputs in float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.network(images).float()
