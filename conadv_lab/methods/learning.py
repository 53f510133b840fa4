"""Whether the optimizer has the weights of both branches: one that was made before the conversion has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LOOKS = 2
"""Gradients whose values are looked at, which a GPU makes the host wait for; that they are there is seen always."""


class LearnsBoth:
    """Finds, at the start of a step, gradients of the adversarial branch that the step before left behind.

    An optimizer that was made before the model was converted clears those of the main branch alone: those of the
    adversarial branch pile up, and its weights never move.

    Args:
        pairs: corresponding weights of both branches that learn.
        looks: how often values may be looked at; 0 where the main branch's gradients are zero by themselves.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], looks: int = LOOKS) -> None:
        self.pairs, self.looks = pairs, looks

    def check(self) -> None:
        """Raise ``ValueError`` where gradients of the main branch are gone and those of the other are not."""
        left = [(main, other) for main, other in self.pairs if other.grad is not None]
        if not left:
            return
        if any(main.grad is None for main, _ in left) or self._only_main_is_zero(left):
            raise ValueError(
                "the optimizer lacks weights of the adversarial branch: their gradients are still there after those "
                "of the main branch were cleared; make it after model = conadv_lab.mixture_batch_norm(model)"
            )

    def _only_main_is_zero(self, left: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> bool:
        """The same of an optimizer that sets gradients to zero and not to None."""
        if self.looks == 0:
            return False
        self.looks -= 1
        one_is = [
            any(p.grad is not None and bool(p.grad.any()) for p in branch)
            for branch in zip(*left, strict=True)
        ]
        return one_is == [False, True]
