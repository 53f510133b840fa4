"""Perturbs images and weights together: ConAdv with SAM, and recycled ConAdv with MSAM.

Staleness makes both attractive: a stale attack adds no depth, so a step only waits for SAM's ascent; and recycled
images and MSAM move along directions that are already computed, so both are free.

Not included: the equal-cost forms, whose single forward pass for both halves would run twice; LookSAM, SAMPa, AsyncSAM
and EXTRAP, whose own staleness could not be told apart from the attack's; and ConAdv with MSAM, which equals recycled
with MSAM at 8/3 of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from conadv_lab.methods.attack import Attack, attack_of
from conadv_lab.methods.ball import UNIT, Bounds, Norm, Value
from conadv_lab.methods.base import Losses, Method, Weights
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.families.msam import MSAM, at_momentum, require_momentum
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.methods.families.sam import SAM
from conadv_lab.methods.later import moving, norm
from conadv_lab.methods.weight_space import RhoOptions, optimizer_of
from conadv_lab.mistakes import require_number

if TYPE_CHECKING:
    from torch import nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.forwards import Criterion


class ConAdvSAM(ConAdv):
    """ConAdv with a SAM step: both gradients are of its whole loss, clean and adversarial.

    Ours. L is ConAdv's loss on the step's clean images and those attacked τ steps ago:

        e = ρ ∇L(w) / ‖∇L(w)‖        w ← w − η ∇L(w + e)

    The attack uses w at the start of the step. Running statistics of both branches are updated by the first pass
    alone. Unlike in `WeightSpace`, steps with a non-finite pass are not skipped.

    >>> from conadv_lab.methods.attack import SignAttack
    >>> method = ConAdvSAM(SignAttack(1 / 255))
    >>> round(method.gradient_evaluations, 2), method.depth
    (4.67, 2)
    """

    name, label, colour, marker = "conadv-sam", "ConAdv with SAM", "#4B4B00", "v"
    about = "as `conadv`, with its gradient taken at w + ρ g/‖g‖"
    source = "ours"
    reads: tuple[type, ...] = (*ConAdv.reads, RhoOptions)
    concurrent = False  # its attack cannot run on other ranks
    repeats = 1
    copies = 2

    def __init__(
        self,
        attack: Attack,
        staleness: int = 1,
        weights: Weights = (1, 1),
        rho: float = SAM.radius,
        **more: Any,
    ) -> None:
        super().__init__(attack, staleness, weights, **more)
        require_number(rho=rho)
        self.rho = rho

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        weights = section.weights or (1, 1)
        return cls(attack_of(config), section.staleness, weights, section.rho, first=section.first)

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        return {"rho": SAM.radius}

    def _attacked_and_trained(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        now = step.number
        waits = now in self._wanted(step)  # for the attack of its own images
        pending = self._attack(model, step, criterion)[now] if waits else self.pending.get(now)

        def train() -> Losses:
            return self._trained(model, step, criterion, pending)

        def first(_counted: bool) -> Losses:
            if waits:
                return train()
            return self.lanes.beside(lambda: self._attack(model, step, criterion), train)[1]

        part = _part(self, model, train)
        before = part.weights.taken()
        losses, ascent = part.here(counted=True, run=first)
        _, gradient = part.at(moving.along(ascent, self.rho), counted=False)
        part.give(gradient)
        part.weights.give(before)
        return losses

    def _trained_at_once(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        # An attack between two micro-batches would see the moved weights.
        return self._attacked_and_trained(model, step, criterion)  # type: ignore[attr-defined, unused-ignore]


class RecycledMSAM(Recycled):
    """Recycled ConAdv with MSAM's gradient: of its whole loss, at w − ρ v / ‖v‖, v the optimizer's momentum.

    Ours. The signs for the next step's images are those at the moved weights, where the clean pass runs. Cost and depth
    are recycled's; MSAM adds none. Weight decay acts as in `MSAM`. Unlike in `WeightSpace`, steps with a non-finite
    pass are not skipped. In your own loop call ``method.attach(optimizer)``.
    """

    name, label, colour, marker = "recycled-msam", "recycled with MSAM", "#99CCEE", "P"
    about = "as `recycled`, with its gradient taken at w − ρ v/‖v‖, where v is the optimizer's momentum"
    source = "ours"
    reads: tuple[type, ...] = (*Recycled.reads, RhoOptions)
    copies = 1

    def __init__(
        self,
        epsilon: Value,
        weights: Weights | None = None,
        rho: float = MSAM.radius,
        *,
        bounds: Bounds = UNIT,
        norm: Norm = "linf",
    ) -> None:
        super().__init__(epsilon, weights=weights, bounds=bounds, norm=norm)
        require_number(rho=rho)
        self.rho = rho

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.epsilon, config.method.weights, config.method.rho)

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        return {"rho": MSAM.radius}

    def check(self, config: Config) -> None:
        require_momentum(self, config)

    def kind(self, step: Step) -> Hashable:
        return super().kind(step), len(optimizer_of(self).state)  # weights that have a momentum

    def _trained(self, model: nn.Module, step: Step, criterion: Criterion, *kept: Any) -> Losses:
        train = super()._trained
        part = _part(self, model, lambda: train(model, step, criterion, *kept))
        before = part.weights.taken()
        losses, gradient = at_momentum(part, optimizer_of(self), self.rho)
        part.give(gradient)
        part.weights.give(before)
        return losses


def _part(method: Any, model: nn.Module, train: Callable[[], Losses]) -> Any:
    """The whole step as one part, whose pass is the method's own training."""
    if getattr(method, "_moving", None) is None or method._moving.model is not model:
        method._moving = moving.Weights(model)

    def run(counted: bool) -> Losses:
        with nullcontext() if counted else norm.uncounted(model):
            return train()

    return moving.Part(method._moving, run, method.gradients, True, [])
