"""AdamP from pytorch-optimizer (extra ``optim``): Adam whose steps do not grow scale-invariant weights."""

from typing import Any

from torch.optim import Optimizer

from conadv_lab import extras
from conadv_lab.optim.options import Optimization


def build_adamp(section: Optimization, groups: list[dict[str, Any]]) -> Optimizer:
    """AdamP (Heo et al., ICLR 2021, arXiv 2006.08217) with its δ 0.1 and wd_ratio 0.1, as AutoWU's authors use it.

    Uses its multi-tensor form, which never synchronises. Weight decay is decoupled.

    Raises:
        ValueError: pytorch-optimizer is not installed.
    """
    assert section.lr is not None, "the config is not resolved"
    package = extras.load("pytorch_optimizer", "optim", "optimizer adamp")
    plain = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    return package.AdamP(plain, lr=section.lr, weight_decay=section.weight_decay, foreach=True)
