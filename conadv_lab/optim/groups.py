"""Which parameters get weight decay and layer-wise rates, and which do not."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conadv_lab.mistakes import require
from conadv_lab.models.nf_resnet import ScaledStandardConv


def parameter_groups(
    model: nn.Module, weight_decay: float, bias_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those with weight decay and the skip list.

    The skip list has every parameter with at most one dimension, γ and β of batch norm (both branches of a
    mixture) and biases, and the gains of convolutions with standardised weights, which act like γ. It gets no
    weight decay, as in Goyal et al. 2017 (section 5.3), and plain momentum under LARS and LAMB, as in MLPerf's
    ResNet-50. torch's own optimisers accept the groups unchanged.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: of the first group, at least 0.
        bias_lr_factor: learning rate of batch norm's β relative to all others. Page ("How to train your ResNet",
            2018) uses 64; 1 keeps β in the skip list's group.

    Returns:
        Two parameter groups with ``params``, ``weight_decay`` and ``adapt``, which only LARS and LAMB read; and, if β
        has its own learning rate, a third one with ``lr_factor``, which `set_learning_rate` reads.

    Raises:
        ValueError: a negative weight decay, or nothing to train.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(model, 1e-4)]
    [(1, 0.0001), (3, 0.0)]
    """
    require(weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
    trainable = [param for param in model.parameters() if param.requires_grad]
    require(bool(trainable), "the number of trainable parameters", 0, "at least 1")
    gains = {id(module.gain) for module in model.modules() if isinstance(module, ScaledStandardConv)}
    decayed = [param for param in trainable if param.ndim > 1 and id(param) not in gains]
    skipped = [param for param in trainable if param.ndim <= 1 or id(param) in gains]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "adapt": True},
        {"params": skipped, "weight_decay": 0.0, "adapt": False},
    ]
    biases = _norm_biases(model)
    if bias_lr_factor == 1 or not biases:
        return groups
    groups[1]["params"] = [param for param in skipped if id(param) not in biases]
    own = [param for param in skipped if id(param) in biases]
    groups.append({"params": own, "weight_decay": 0.0, "adapt": False, "lr_factor": bias_lr_factor})
    return groups


def learning_rates(optimizer: Optimizer, lr: float) -> list[float]:
    """``lr`` times each parameter group's ``lr_factor``, if it has one."""
    return [lr * group.get("lr_factor", 1.0) for group in optimizer.param_groups]


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every parameter group's learning rate to ``lr`` times its ``lr_factor``, if it has one."""
    for group, rate in zip(optimizer.param_groups, learning_rates(optimizer, lr), strict=True):
        group["lr"] = rate


def _norm_biases(model: nn.Module) -> set[int]:
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return {id(norm.bias) for norm in norms if norm.bias is not None and norm.bias.requires_grad}
