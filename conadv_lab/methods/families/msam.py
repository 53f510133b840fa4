"""MSAM: the weights are moved against the optimizer's momentum, which costs no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, torch
from conadv_lab.methods.weight_space import RhoOptions, WeightSpace

if TYPE_CHECKING:
    from torch import Tensor

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Move, Part


class MSAM(WeightSpace):
    """Momentum-SAM: one gradient a step, at w − ρ v / ‖v‖ with v the momentum as it is before the update.

    Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024:

        w̃ = w − ρ v / ‖v‖        v ← μ v + ∇L(w̃) + λ w̃        w ← w − η v

    The weight decay λ acts at w̃, as in the authors' code: what the optimizer adds at w is completed by λ (w̃ − w).
    With LAMB, whose decay is not part of the gradient, it stays at w. v is whatever the optimizer keeps, and its norm
    is over all weights; under LARS it holds each layer's trust ratio. The weights that are evaluated and saved are w,
    and batch norm is re-estimated at them. ρ = 0.3 is ours. One gradient.

    A loop of one's own tells it the optimizer: ``method.attach(optimizer)``.
    """

    name, label, colour = "msam", "MSAM", "#CC6677"
    about = "B clean images, with the gradient at w − ρ v/‖v‖, v the optimizer's momentum"
    source = "Becker et al., 2024"
    reads: tuple[type, ...] = (RhoOptions,)
    perturbations = ("global",)
    radius = 0.3
    copies = 1

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho)

    def check(self, config: Config) -> None:
        section = config.optimization
        if section.optimizer != "lamb" and section.momentum == 0:
            raise ValueError(
                f"momentum is 0; allowed for {self.name}: above 0, as it moves against the momentum"
            )

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        move = self.stale_move(part, step)
        assert move is not None
        losses, gradient = part.at(move, counted=True)
        self.complete_decay(part, move, gradient)
        part.give(gradient)
        return losses, None

    def stale_move(self, part: Part, step: Step) -> Move | None:
        against = moving.along(moving.momenta(self.needed_optimizer(), part.weights), self.rho)
        return moving.Move(against.direction, -against.scale)

    def complete_decay(self, part: Part, move: Move, gradient: list[Tensor]) -> None:
        """Add λ (w̃ − w), where the optimizer will add λ w to the gradient."""
        optimizer = self.needed_optimizer()
        if not moving.decays_in_gradient(optimizer):
            return
        decays = [group.get("weight_decay", 0.0) for group in moving.groups(optimizer, part.weights)]
        with torch.no_grad():
            for one, direction, decay in zip(gradient, move.direction, decays, strict=True):
                if decay:
                    one.addcmul_(direction, move.scale.to(one.device, one.dtype), value=decay)
