"""Checks that the optimizer has the parameters of both branches: one created before the conversion does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LOOKS = 2
"""How many checks look at gradient values, which synchronises with a GPU; their presence is always checked."""


class LearnsBoth:
    """Detects, at the start of a step, gradients of the adversarial branch left over from the previous step.

    An optimizer created before the model was converted clears only the main branch's gradients: those of the
    adversarial branch accumulate, and its parameters never change.

    Args:
        pairs: corresponding trainable parameters of both branches.
        looks: how often values may be checked; 0 if the main branch's gradients may legitimately be zero.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], looks: int = LOOKS) -> None:
        self.pairs, self.looks = pairs, looks

    def check(self) -> None:
        """Raise ``ValueError`` if the main branch's gradients were cleared but the other branch's were not."""
        left = [(main, other) for main, other in self.pairs if other.grad is not None]
        if not left:
            return
        if any(main.grad is None for main, _ in left) or self._only_main_is_zero(left):
            raise ValueError(
                "the optimizer lacks parameters of the adversarial branch: their gradients remain although those of "
                "the main branch were cleared; create it after model = conadv_lab.mixture_batch_norm(model)"
            )

    def _only_main_is_zero(self, left: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> bool:
        """The same for an optimizer that sets gradients to zero instead of None."""
        if self.looks == 0:
            return False
        self.looks -= 1
        one_is = [
            any(p.grad is not None and bool(p.grad.any()) for p in branch)
            for branch in zip(*left, strict=True)
        ]
        return one_is == [False, True]
