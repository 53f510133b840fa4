"""Batch statistics of one global step, averaged over all ghost groups that a norm's branch saw in it.

Every forward through `branch_of` begins with the same state, as what the one before saw is folded into the averages by
then. So a compiled forward, which is specialised to the state that it began with, serves any number of micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Averages:
    """Of one branch of one norm.

    Attributes:
        branch: "main" or "adversarial".
        norm: a batch norm that tracks statistics; torch types its buffers as optional.
        mean, var: (C,) statistics of the latest group.
        waiting: whether they are not folded into the average yet.
        step_mean, step_var: (C,) average over the step's earlier groups.
        count: how many groups those are.
    """

    branch: str
    norm: Any
    mean: Tensor
    var: Tensor
    step_mean: Tensor
    step_var: Tensor
    waiting: bool = False
    count: int = 0

    @classmethod
    def of(cls, branch: str, norm: Any) -> "Averages":
        """Empty ones, on the norm's device."""
        mean, var = norm.running_mean, norm.running_var
        zeros = torch.zeros_like
        return cls(branch, norm, zeros(mean), zeros(var), zeros(mean), zeros(var))

    def fits(self, norm: Any) -> bool:
        stored, wanted = self.mean, norm.running_mean
        return self.norm is norm and stored.device == wanted.device and stored.dtype == wanted.dtype


@torch.no_grad()
def fold(seen: Sequence[Averages]) -> None:
    """Weigh the latest groups into the averages."""
    by_count: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for one in seen:
        one.waiting, one.count = False, one.count + 1
        old, new = by_count.setdefault(one.count, ([], []))
        old += [one.step_mean, one.step_var]
        new += [one.mean, one.var]
    for count, (old, new) in by_count.items():
        torch._foreach_lerp_(old, new, 1.0 / count)


@torch.no_grad()
def clear(seen: Sequence[Averages]) -> None:
    """Make averages empty."""
    # Zeroed and not only outweighed: 0 · NaN of a step that went wrong would stay NaN for ever.
    if seen:
        torch._foreach_zero_([t for one in seen for t in (one.mean, one.var, one.step_mean, one.step_var)])
    for one in seen:
        one.waiting, one.count = False, 0
