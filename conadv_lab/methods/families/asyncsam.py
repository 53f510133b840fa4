"""AsyncSAM: SAM with the ascent gradient from τ steps ago."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conadv_lab.methods.base import Losses, Method, StalenessOptions
from conadv_lab.methods.later import moving
from conadv_lab.methods.weight_space import PerturbationOptions, RhoOptions, WeightSpace, Whose
from conadv_lab.mistakes import require_count

if TYPE_CHECKING:
    from torch import Tensor

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Move, Part


class AsyncSAM(WeightSpace):
    """SAM whose step does not wait for its ascent: it moves along the gradient from τ steps ago.

    "Asynchronous Sharpness-Aware Minimization for Fast and Accurate Deep Learning", arXiv 2503.11147:

        e_t = ρ g_{t−τ} / ‖g_{t−τ}‖,  g_t = ∇L_t(w_t)        w ← w − η ∇L_t(w_t + e_t)

    with τ = 1 in the paper: ConAdv's idea in weight space. L_t is the loss of step t's own images in both gradients, so
    no look-ahead is needed. We found no code by the authors. Ours: any τ; no move in the first τ steps, as there is no
    gradient yet; SAM's ρ = 0.05. Only the simulator models the paper's smaller ascent batch (``ascent_share``). Two
    gradients that can run in parallel.

    Args:
        staleness: τ ≥ 0; 0 is SAM.

    >>> AsyncSAM().gradient_evaluations, AsyncSAM().depth, AsyncSAM(staleness=0).depth
    (2.0, 1, 2)
    """

    name, label, colour, marker = "asyncsam", "AsyncSAM", "#44AA99", "X"
    about = "B clean images, as `sam` but with the ascent gradient from `--staleness` steps earlier"
    source = "Jo, Lim, Lee, 2025"
    reads = (RhoOptions, PerturbationOptions, StalenessOptions)
    side = "ascent"
    concurrent = True

    def __init__(
        self, rho: float | None = None, perturbation: Whose | None = None, staleness: int = 1
    ) -> None:
        super().__init__(rho, perturbation)
        require_count(0, staleness=staleness)
        self.staleness = self.keeps = staleness
        self.copies = 2 + staleness

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho, config.method.perturbation, config.method.staleness)

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        losses, ascent = part.here(counted=True)
        move = self.stale_move(part, step) or moving.along(ascent, self.rho)
        _, gradient = part.at(move, counted=False)
        part.give(gradient)
        return losses, ascent if self.staleness else None

    def stale_move(self, part: Part, step: Step) -> Move | None:
        return moving.along(part.kept[0], self.rho) if self.staleness else None
