"""LookSAM: SAM's second gradient in one step of k, with its useful part reused in the others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, torch
from conadv_lab.methods.weight_space import RhoOptions, WeightSpace
from conadv_lab.mistakes import require_count, require_number

if TYPE_CHECKING:
    from torch import Tensor

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Part


@dataclass(frozen=True)
class LookOptions:
    """Options of `looksam`."""

    look_every: int = 5
    """k: one step of k computes SAM's second gradient."""
    look_alpha: float = 0.1
    """α: how much of it the other steps use."""

    def check(self) -> None:
        require_count(look_every=self.look_every)
        require_number(look_alpha=self.look_alpha)


class LookSAM(WeightSpace):
    """SAM in one step of k; its component orthogonal to the gradient, which changes slowly, is reused in between.

    Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, Algorithm 1. With g = ∇L(w):

        t mod k = 0    g_s = ∇L(w + ρ g / ‖g‖),  g_v = g_s − (g_s·g / ‖g‖²) g      w ← w − η g_s
        otherwise                                              w ← w − η (g + α ‖g‖ / ‖g_v‖ g_v)

    Norms and products are over all weights. g_v is used in later steps, so it must be of the whole step: there is no
    m-sharpness. k = 5; α = 0.1 is what MSAM's authors used for CNNs, and LookSAM's own 0.7 is for vision transformers;
    ρ = 0.05 is SAM's. On average 1 + 1/k gradients in sequence.

    >>> LookSAM().gradient_evaluations, LookSAM().depth, LookSAM().step_cost(10, 20), LookSAM().step_cost(11, 20)
    (1.2, 1.2, (2.0, 2), (1.0, 1))
    """

    name, label, colour, marker = "looksam", "LookSAM", "#117733", ">"
    about = "B clean images, with SAM's second gradient computed once every `--look-every` steps"
    source = "Liu et al., CVPR 2022"
    reads = (RhoOptions, LookOptions)
    side = "ascent"
    perturbations = ("global",)
    keeps = 1
    copies = 3

    def __init__(self, rho: float | None = None, every: int = 5, alpha: float = 0.1) -> None:
        super().__init__(rho)
        require_count(every=every)
        require_number(alpha=alpha)
        self.every, self.alpha, self.side_steps = every, alpha, 1 / every

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho, config.method.look_every, config.method.look_alpha)

    def step_cost(self, number: int, steps: int) -> tuple[float, float]:
        return (2.0, 2) if self._looks(number) else (1.0, 1)

    def _looks(self, number: int) -> bool:
        return number % self.every == 0

    def kind(self, step: Step) -> Hashable | None:
        return super().kind(step), self._looks(step.number)

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        losses, gradient = part.here(counted=True)
        with torch.no_grad():
            if not self._looks(step.number):
                (across,) = part.kept
                scale = self.alpha * moving.ratio(moving.norm(gradient), moving.norm(across))
                torch._foreach_addcmul_(gradient, across, [scale] * len(across))
                part.give(gradient)
                return losses, None
        _, sharp = part.at(moving.along(gradient, self.rho), counted=False)
        with torch.no_grad():
            share = moving.ratio(moving.inner(sharp, gradient), moving.inner(gradient, gradient))
            torch._foreach_mul_(gradient, -share)
            torch._foreach_add_(gradient, sharp)
        part.give(sharp)
        return losses, gradient
