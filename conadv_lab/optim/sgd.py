"""torch's SGD, built from a config's section."""

from typing import Any

import torch

from conadv_lab.optim.momenta import begin_momenta
from conadv_lab.optim.options import Optimization


def build_sgd(section: Optimization, groups: list[dict[str, Any]]) -> torch.optim.SGD:
    """Fused if all parameters are on a GPU."""
    assert section.lr is not None, "the config is not resolved"
    plain = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    fused = all_on_gpu(groups)
    sgd = torch.optim.SGD(
        plain, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused or None
    )
    if fused:
        sgd.register_step_pre_hook(begin_momenta)
    return sgd


def all_on_gpu(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])
