"""Batch statistics of one global step, averaged over all ghost groups that a norm's branch saw in it.

Every forward through `branch_of` begins with the same state, as what the one before saw is folded into the averages by
then. So a compiled forward, which is specialised to the state that it began with, serves any number of micro-batches.
"""

from collections.abc import Callable, Sequence
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
        step_mean, step_var: (C,) average over the step's earlier groups.
        waiting: whether the latest group is not folded into the average yet.
        count: how many groups are.
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
    """All that one global step knows of its batch statistics: the one place that says what was seen and what counts.

    A forward's statistics are `folded` as soon as it ends, on the stream it ran on, so no later forward or backward, of
    whichever branch and in whatever order, finds anything half done. Forwards of one branch follow one another; those
    of the two branches may run beside each other.

    Attributes:
        open: whether a step is under way; outside it a norm updates at every forward.
        seen: what the forward under way saw, folded: what the step's earlier ones did.
        twice: whether the forward under way went through a norm twice, so that it cannot be taken back.
    """

    def __init__(self) -> None:
        self.open = self.twice = False
        self.seen: list[Averages] = []
        self.folded: dict[Averages, None] = {}

    def sees(self, group: Averages) -> None:
        """A forward is about to write a group's statistics."""
        if group.waiting:  # the norm is used twice in a forward, or forwards follow without `branch_of`
            self.fold()
            self.twice = True
        group.waiting = True
        self.seen.append(group)

    @torch.no_grad()
    def fold(self) -> None:
        """Weigh what the latest forward saw into the averages."""
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
        """Leave out what the forward under way saw, as it failed."""
        for one in self.seen:
            one.waiting = False
        self.seen.clear()

    def commit(self, momentum: float | None, averaged: Callable[[Sequence[Averages]], None]) -> None:
        """Move the running statistics once by the step's averages.

        Args:
            momentum: weight of the new average; None takes each norm's own, and None in a norm means a plain average.
            averaged: is given the averages first, to bring them together with those of other ranks.
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
            # The reciprocal of a counter stays on its device, where a number would make the host wait.
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
        """Whether a forward of the step went through a branch."""
        return any(group.branch == branch for group in self.folded)

    @torch.no_grad()
    def close(self) -> None:
        """End the step, whatever became of it: averages are empty again."""
        try:
            self.fold()
            used = list(self.folded)
            # Zeroed and not only outweighed: 0 · NaN of a step that went wrong would stay NaN for ever.
            if used:
                torch._foreach_zero_(
                    [t for one in used for t in (one.mean, one.var, one.step_mean, one.step_var)]
                )
        finally:  # after a failed capture every operator raises, and the step must be closed all the same
            for one in (*self.folded, *self.seen):
                one.waiting, one.count = False, 0
            self.folded.clear()
            self.seen.clear()
            self.open = False
