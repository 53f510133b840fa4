"""S²-SAM: SAM in one pass, along the previous step's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conadv_lab.methods.later import moving
from conadv_lab.methods.weight_space import PerturbationOptions, RhoOptions, WeightSpace

if TYPE_CHECKING:
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Move, Part


class S2SAM(WeightSpace):
    """Single-step SAM: moves along the previous step's gradient, which was also computed at moved weights.

    "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse Training",
    NeurIPS 2024:

        e_t = ρ q_{t−1} / ‖q_{t−1}‖,  q_t = ∇L_t(w_t + e_t)        w ← w − η q_t

    The first step does not move. One gradient. ρ = 0.05 is SAM's.
    """

    name, label, colour, marker = "s2sam", "S²-SAM", "#DDCC77", "d"
    about = "B clean images, with the gradient at w + ρ q/‖q‖, where q is the previous step's gradient"
    source = "S²-SAM, NeurIPS 2024"
    reads: tuple[type, ...] = (RhoOptions, PerturbationOptions)
    staleness = 1
    keeps = 1
    copies = 2

    def stale_move(self, part: Part, step: Step) -> Move | None:
        return moving.along(part.kept[0], self.rho)
