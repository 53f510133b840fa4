"""Which parameters are decayed and adapted, and which are left alone."""

from typing import Any

from torch import nn

from conadv_lab.mistakes import require


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into the decayed ones and the skip list.

    The skip list holds every parameter of at most one dimension: γ and β of batch norm (both branches of a
    mixture) and biases. It takes no weight decay, as in Goyal et al. 2017 (section 5.3), and plain momentum
    under LARS and LAMB, as in MLPerf's ResNet-50. torch's own optimisers take the groups as they are.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: of the first group, at least 0.

    Returns:
        Two groups with the entries ``params``, ``weight_decay`` and ``adapt``, which only LARS and LAMB read.

    Raises:
        ValueError: a negative weight decay, or nothing to train.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(model, 1e-4)]
    [(1, 0.0001), (3, 0.0)]
    """
    require(weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
    trainable = [param for param in model.parameters() if param.requires_grad]
    require(bool(trainable), "the number of trainable parameters", 0, "at least 1")
    decayed = [param for param in trainable if param.ndim > 1]
    skipped = [param for param in trainable if param.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay, "adapt": True},
        {"params": skipped, "weight_decay": 0.0, "adapt": False},
    ]
