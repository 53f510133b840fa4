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

    timm's batch norms with built-in dropout and activation are split, as only plain ones get an adversarial branch.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """
    timm = extras.load("timm", "vision", f"model {TIMM}{name}")
    if not timm.is_model(name):
        raise unknown("timm model", name, get_close_matches(name, timm.list_models(), n=5, cutoff=0.4))
    network = timm.create_model(name, num_classes=classes)
    described: dict[str, Any] = network.default_cfg
    return TimmModel(split_batch_norms(network), tuple(described["mean"]), tuple(described["std"]))


def split_batch_norms(network: nn.Module) -> nn.Module:
    """Split timm's batch norms with dropout and activation into three modules; changes and returns the network.

    `conadv_lab.mixture_batch_norm` then converts it. Outputs are the same; the names of these norms' parameters gain
    ``.0``, as ``bn1.weight`` becomes ``bn1.0.weight``.

    Args:
        network: of ``timm.create_model``.
    """
    children: list[tuple[str, Any]] = list(network.named_children())
    for name, child in children:
        if type(child).__name__ == "BatchNormAct2d":
            setattr(network, name, nn.Sequential(_plain(child), child.drop, child.act).train(child.training))
        else:
            split_batch_norms(child)
    return network


def _plain(norm: Any) -> nn.BatchNorm2d:
    """With the same parameters and statistics, on their device."""
    plain: Any = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    for name, value in (norm._parameters | norm._buffers).items():
        setattr(plain, name, value)
    return plain
