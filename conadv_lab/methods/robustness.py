"""Robust accuracy: a network's accuracy under projected gradient ascent, for runs and any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.attack import PGDAttack
from conadv_lab.methods.later import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.data.loader import Batch
    from conadv_lab.methods.forwards import Criterion

STEPS = 10
REACH = 2.5
"""Total length of all steps of an evaluation attack, in radii of the ball (Madry et al., ICLR 2018)."""


class EvaluationAttack(PGDAttack):
    """The attack for measuring robust accuracy: k steps of 2.5 ε/k from a random start, on the main branch.

    Args:
        epsilon, norm, seed, random_start: as for `PGDAttack`.
        steps: k.
        step: size of a step; None: 2.5 ε/k.
        gradient: images and labels to the input gradient; None: that of the attacked model.

    >>> EvaluationAttack(0.1, 20).step
    0.0125
    """

    def __init__(
        self,
        epsilon: float,
        steps: int = STEPS,
        norm: Literal["linf", "l2"] = "linf",
        seed: int = 0,
        *,
        step: float | None = None,
        random_start: bool = True,
        gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        step = step or REACH * epsilon / steps or None  # ε = 0 means no step
        super().__init__(epsilon, step, random_start, seed, steps=steps, norm=norm, branch="main")
        self._gradient = gradient

    def gradient(
        self, model: nn.Module, images: Tensor, labels: Tensor, criterion: Criterion, *tokens: Any
    ) -> Tensor:
        if self._gradient is not None:
            return self._gradient(images, labels)
        return super().gradient(model, images, labels, criterion, *tokens)


def right_under_attack(
    attack: PGDAttack,
    model: nn.Module,
    batch: Batch,
    criterion: Criterion,
    outputs: Callable[[Tensor], Tensor],
) -> Tensor:
    """How many images of a batch are still classified correctly, as a 0-d tensor.

    Args:
        attack: such as `EvaluationAttack`.
        model, criterion: what to attack, as for `PGDAttack.perturb`.
        outputs: images (m, C, H, W) in [0, 1] to logits (m, classes).
    """
    images = attack.apply(batch, attack.perturb(model, batch, criterion))
    with torch.no_grad():
        return (outputs(images).argmax(1) == batch.labels).sum()
