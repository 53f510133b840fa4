"""timm's image models (EfficientNet and hundreds more), by name ``timm:NAME``; needs the extra ``vision``."""

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from conadv_lab import extras
from conadv_lab.mistakes import unknown
from conadv_lab.models.options import TIMM
from conadv_lab.models.resnet import Normalised


class TimmModel(Normalised):
    """A timm model that takes images in [0, 1] and normalises them according to its configuration."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(mean, std)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalise(images))


def timm_model(name: str, classes: int) -> TimmModel:
    """A model with random weights; ``name`` as in timm, without the prefix.

    timm's batch norms with built-in dropout and activation are split up, as only plain ones get an adversarial branch.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """
    timm = extras.load("timm", "vision", f"model {TIMM}{name}")
    if not timm.is_model(name):
        raise unknown("timm model", name, get_close_matches(name, timm.list_models(), n=5, cutoff=0.4))
    network = timm.create_model(name, num_classes=classes)
    described: dict[str, Any] = network.default_cfg
    _take_apart(network)
    return TimmModel(network, tuple(described["mean"]), tuple(described["std"]))


def _take_apart(module: nn.Module) -> None:
    children: list[tuple[str, Any]] = list(module.named_children())
    for name, child in children:
        if type(child).__name__ == "BatchNormAct2d":
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict({k: v for k, v in child.state_dict().items() if "." not in k})
            setattr(module, name, nn.Sequential(norm, child.drop, child.act))
        else:
            _take_apart(child)
