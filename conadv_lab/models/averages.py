"""Batch statistics of one global step, averaged over all ghost batches that a norm's branch saw in it.

Every forward pass through `branch_of` starts from the same state, as the previous one's statistics are already folded
into the averages. So a compiled forward pass, which is specialised to its initial state, serves any number of
micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Averages:
    """Averages for one branch of one norm.

    Attributes:
        branch: "main" or "adversarial".
        norm: a batch norm that tracks statistics; torch types its buffers as optional.
        mean, var: (C,) statistics of the latest ghost batch.
        step_mean, step_var: (C,) average over the step's earlier ones.
        waiting: whether the latest one is not yet folded into the average.
        count: number of ghost batches in the average.
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


class StepStatistics:
    """A global step's batch statistics; the single place that records what was seen and what counts.

    A forward pass's statistics are `folded` as soon as it ends, on its stream, so later passes of either branch, in any
    order, never see partial results. Forward passes of one branch run in sequence; those of different branches may run
    in parallel.

    Attributes:
        open: whether a step is in progress; outside one, a norm updates at every forward pass.
        seen: what the current forward pass saw; folded: what the step's earlier ones saw.
        twice: whether the current forward pass used a norm twice, so that it cannot be undone.
    """

    def __init__(self) -> None:
        self.open = self.twice = False
        self.seen: list[Averages] = []
        self.folded: dict[Averages, None] = {}

    def sees(self, group: Averages) -> None:
        """A forward pass is about to write a ghost batch's statistics."""
        if group.waiting:  # the norm is used twice in a forward pass, or passes follow without `branch_of`
            self.fold()
            self.twice = True
        group.waiting = True
        self.seen.append(group)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the latest forward pass's statistics into the averages."""
        by_count: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for one in self.seen:
            one.waiting, one.count = False, one.count + 1
            old, new = by_count.setdefault(one.count, ([], []))
            old += [one.step_mean, one.step_var]
            new += [one.mean, one.var]
        for count, (old, new) in by_count.items():
            torch._foreach_lerp_(old, new, 1.0 / count)
        self.folded |= dict.fromkeys(self.seen)
        self.seen.clear()

    def forget_seen(self) -> None:
        """Discard the statistics of the current forward pass, which failed."""
        for one in self.seen:
            one.waiting = False
        self.seen.clear()

    def commit(self, momentum: float | None, averaged: Callable[[Sequence[Averages]], None]) -> None:
        """Update the running statistics once with the step's averages.

        Args:
            momentum: weight of the new average; None: each norm's own, where None means a cumulative average.
            averaged: called with the averages first, to combine them over ranks.
        """
        self.fold()
        if not self.folded:
            return
        averaged(list(self.folded))
        torch._foreach_add_([group.norm.num_batches_tracked for group in self.folded], 1)
        by_weight: dict[float | Tensor, tuple[list[Tensor], list[Tensor]]] = {}
        for group in self.folded:
            norm = group.norm
            weight = momentum if momentum is not None else norm.momentum
            # The reciprocal of the counter stays on its device; reading it would synchronise.
            weight = norm.num_batches_tracked.double().reciprocal() if weight is None else weight
            old, new = by_weight.setdefault(weight, ([], []))
            old += [norm.running_mean, norm.running_var]
            new += [group.step_mean, group.step_var]
        with torch.no_grad():
            for weight, (old, new) in by_weight.items():
                if isinstance(weight, Tensor):
                    for running, seen in zip(old, new, strict=True):
                        running.lerp_(seen, weight.to(running.dtype))
                else:
                    torch._foreach_lerp_(old, new, weight)

    def touched(self, branch: str) -> bool:
        """Whether a forward pass of the step used a branch."""
        return any(group.branch == branch for group in self.folded)

    @torch.no_grad()
    def close(self) -> None:
        """End the step, successful or not, and clear the averages."""
        try:
            self.fold()
            used = list(self.folded)
            # Zero them explicitly: after a failed step, 0 · NaN would stay NaN forever.
            if used:
                torch._foreach_zero_(
                    [t for one in used for t in (one.mean, one.var, one.step_mean, one.step_var)]
                )
        finally:  # after a failed capture every operator raises, but the step must still be closed
            for one in (*self.folded, *self.seen):
                one.waiting, one.count = False, 0
            self.folded.clear()
            self.seen.clear()
            self.open = False
