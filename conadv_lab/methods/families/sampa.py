"""SAMPa: SAM whose two gradients do not wait for each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, torch
from conadv_lab.methods.weight_space import RhoOptions, WeightSpace
from conadv_lab.mistakes import require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.methods.moving import Move, Part, Run


@dataclass(frozen=True)
class SampaOptions:
    """Options of `sampa`."""

    sampa_lambda: float = 0.2
    """λ: weight of the gradient at the point ahead."""

    def check(self) -> None:
        require(0 <= self.sampa_lambda <= 1, "sampa_lambda", self.sampa_lambda, "0 to 1")


class SAMPa(WeightSpace):
    """Parallelised SAM: computes the next step's ascent gradient at a point that is already known.

    Xie, Pethick and Cevher, "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024, Algorithm 1. f_t is the
    loss of step t's images:

        x̃_t = x_t + ρ ∇f_t(y_t) / ‖∇f_t(y_t)‖        y_{t+1} = x_t − η_t ∇f_t(y_t)
        x_{t+1} = x_t − η_t (1 − λ) ∇f_t(x̃_t) − η_t λ ∇f_{t+1}(y_{t+1})

    with y_0 = x_0. As in the authors' code y_{t+1} is where the optimizer would go with that gradient, including
    momentum and decay, and its gradient uses the next step's images, so the stream has to look one step ahead. They
    count a step from the new batch, we from the older one. Ours: the last step, which has no successor, uses the full
    ∇f(x̃). λ = 0.2 is the paper's, ρ = 0.05 is SAM's. Two gradients in parallel; the first step computes one more, the
    last one less. Running statistics are updated when a batch is first seen, one step ahead.

    In your own loop call ``method.attach(optimizer)`` with torch's SGD.
    """

    name, label, colour, marker = "sampa", "SAMPa", "#882255", "8"
    about = "B clean images, as `sam` but with the ascent gradient computed one step ahead"
    source = "Xie et al., NeurIPS 2024"
    reads = (RhoOptions, SampaOptions)
    side = "ascent"
    concurrent = True
    staleness = lookahead = 1
    perturbations = ("global",)
    keeps = 1
    copies = 4

    def __init__(self, rho: float | None = None, weight: float = 0.2) -> None:
        super().__init__(rho)
        require(0 <= weight <= 1, "weight", weight, "0 to 1")
        self.weight = weight
        self._ahead: Run | None = None
        self._for: int | None = None  # the step whose gradient is kept

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho, config.method.sampa_lambda)

    def check(self, config: Config) -> None:
        if config.optimization.optimizer != "sgd":
            raise ValueError(
                f"optimizer is {config.optimization.optimizer!r}; allowed for {self.name}: 'sgd', whose step it "
                "predicts"
            )

    def step_cost(self, number: int, steps: int) -> tuple[float, float]:
        ahead, fresh = number < steps - 1, number == 0
        return 1.0 + ahead + fresh, 1 + fresh

    def offsets(self, step: Step) -> Sequence[int]:
        return (0, 1) if step.number < step.last else (0,)

    def kind(self, step: Step) -> Hashable | None:
        momenta = len(self.needed_optimizer().state)
        return super().kind(step), self._for == step.number, step.number < step.last, momenta

    def runs(self, model: nn.Module, step: Step, criterion: Criterion) -> Any:
        self._ahead = None
        if step.number < step.last:
            self._ahead = self.run(model, partial(step.batches, 1), criterion)
        return super().runs(model, step, criterion)

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        (ascent,) = part.kept
        if self._for != step.number:
            moving.shift(part.kept, part.here(counted=True)[1])
        losses, gradient = part.at(moving.along(ascent, self.rho), counted=False)
        if self._ahead is None:
            part.give(gradient)
            return losses, None
        point = moving.step_of_sgd(self.needed_optimizer(), part.weights, ascent)
        _, ahead = part.at(point, counted=True, run=self._ahead)
        with torch.no_grad():
            torch._foreach_lerp_(gradient, ahead, self.weight)
        part.give(gradient)
        return losses, ahead

    def advance(self, step: Step) -> None:
        self._for = step.number + 1

    def stale_move(self, part: Part, step: Step) -> Move | None:
        return moving.along(part.kept[0], self.rho) if self._for == step.number else None

    def forget(self) -> None:
        super().forget()
        self._for = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {"shared": state.get("shared", {}) | {"for": self._for}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._for = state.get("shared", {}).get("for")
