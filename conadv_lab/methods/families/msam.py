"""MSAM: moves the weights against the optimizer's momentum, which costs no gradient."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, torch
from conadv_lab.methods.weight_space import RhoOptions, WeightSpace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Move, Part


class MSAM(WeightSpace):
    """Momentum-SAM: one gradient per step, at w − ρ v / ‖v‖ with v the momentum before the update.

    Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024:

        w̃ = w − ρ v / ‖v‖        v ← μ v + ∇L(w̃) + λ w̃        w ← w − η v

    The weight decay λ acts at w̃, as in the authors' code: we add λ (w̃ − w) to what the optimizer adds at w. With LAMB,
    whose decay is not part of the gradient, it stays at w. v is the optimizer's momentum, and its norm is over all
    weights; under LARS it includes each layer's trust ratio. The weights that are evaluated and saved are w, and batch
    norm is re-estimated at them. ρ = 0.3 is ours. One gradient.

    In your own loop call ``method.attach(optimizer)``.
    """

    name, label, colour, marker = "msam", "MSAM", "#CC6677", "*"
    about = "B clean images, with the gradient at w − ρ v/‖v‖, where v is the optimizer's momentum"
    source = "Becker et al., 2024"
    reads: tuple[type, ...] = (RhoOptions,)
    perturbations = ("global",)
    radius = 0.3
    copies = 1

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho)

    def check(self, config: Config) -> None:
        require_momentum(self, config)

    def kind(self, step: Step) -> Hashable | None:
        return super().kind(step), len(self.needed_optimizer().state)  # weights that have a momentum

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        losses, gradient = at_momentum(part, self.needed_optimizer(), self.rho)
        part.give(gradient)
        return losses, None

    def stale_move(self, part: Part, step: Step) -> Move | None:
        return against_momentum(part, self.needed_optimizer(), self.rho)


def require_momentum(method: Method, config: Config) -> None:
    """Raise ``ValueError`` if the config's optimizer has no momentum."""
    section = config.optimization
    if section.optimizer in ("sgd", "lars") and section.momentum == 0:
        raise ValueError(
            f"momentum is 0; allowed for {method.name}: above 0, as it moves against the momentum"
        )


def against_momentum(part: Part, optimizer: Optimizer, rho: float) -> Move:
    """−ρ v / ‖v‖."""
    along = moving.along(moving.momenta(optimizer, part.weights), rho)
    return moving.Move(along.direction, -along.scale)


def at_momentum(part: Part, optimizer: Optimizer, rho: float) -> tuple[Losses, list[Tensor]]:
    """(losses, gradient) of the part at w̃, plus λ (w̃ − w) if the optimizer will add λ w to the gradient."""
    move = against_momentum(part, optimizer, rho)
    losses, gradient = part.at(move, counted=True)
    if moving.decays_in_gradient(optimizer):
        with torch.no_grad():
            groups = moving.groups(optimizer, part.weights)
            for one, direction, group in zip(gradient, move.direction, groups, strict=True):
                if decay := group.get("weight_decay", 0.0):
                    one.addcmul_(direction, move.scale.to(one.device, one.dtype), value=decay)
    return losses, gradient
