"""Cheap adversarial training on attacked images only: FGSM from a random start, and FreeAT."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.attack import SignAttack, StepOptions
from conadv_lab.methods.ball import UNIT, Ball, Bounds, Value, times
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.families.conadv import ConAdv, Placement, StaleOptions
from conadv_lab.methods.kept import Slots
from conadv_lab.methods.later import norm, steps, torch
from conadv_lab.mistakes import require, require_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.forwards import Criterion


class FGSMRS(ConAdv):
    """Fast adversarial training: attacked images only, one step of 1.25 ε from a uniform start.

    Wong et al., "Fast is better than free: Revisiting adversarial training", ICLR 2020:
    x̂ = clip[0,1](x + clip[−ε,ε](u + α · sign ∇ₓL(x + u))), u uniform in the ball. The attack runs in training mode
    through the only batch norm, the main branch, and leaves its running statistics unchanged. With τ ≥ 1 it is stale
    like ConAdv's, using the same queue; that form is ours. A drop in PGD accuracy by more than 20 points between two
    evaluations is a sign of catastrophic overfitting: see `conadv_lab.training.overfitting`.

    Args:
        epsilon: radius of the L∞ ball, in the images' units; a number, or one value per channel.
        step: size α of the attack step; None: 1.25 ``epsilon``.
        staleness, first, placement: as for `ConAdv`.
        seed: of the random start.
        bounds: lowest and highest image value, as for `SignAttack`.

    >>> FGSMRS(8 / 255).depth, FGSMRS(8 / 255, staleness=1).depth
    (2, 1)
    """

    name, label, colour, marker = "fgsm-rs", "FGSM-RS", "#17BECF", "d"
    about = "B images attacked by one step from a random start, and no clean ones"
    source = "Wong et al., ICLR 2020"
    reads = (StepOptions, StaleOptions)
    clean_fraction = 0.0
    two_branches = False
    new_fraction = 1.0

    def __init__(
        self,
        epsilon: Value,
        step: Value | None = None,
        staleness: int = 0,
        first: Literal["initial", "clean"] = "initial",
        placement: Placement | None = None,
        seed: int = 0,
        *,
        bounds: Bounds = UNIT,
    ) -> None:
        length = times(1.25, epsilon) if step is None else step
        attack = SignAttack(epsilon, length, seed=seed, bounds=bounds, branch="main", statistics="batch")
        super().__init__(attack, staleness, (0, 1), first, placement)

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        return {"attack_step": 1.25 * config.method.epsilon, "staleness": 0}

    @classmethod
    def of(cls, config: Config) -> Method:
        section, seed = config.method, config.training.seed
        return cls(section.epsilon, section.attack_step, section.staleness, section.first, seed=seed)

    def passes(self, step: Step) -> int:
        return 1

    def _trained(
        self, model: nn.Module, step: Step, criterion: Criterion, pending: list[Any] | None
    ) -> Losses:
        if pending is None:
            return super()._trained(model, step, criterion, None)
        pairs = zip(step.batches(), pending, strict=True)
        return Losses(steps.total(self._train_on_one(model, *pair, criterion) for pair in pairs))

    def _trained_at_once(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        def trained(batch: Batch) -> Tensor:
            return self._train_on_one(model, batch, self.attack.perturb(model, batch, criterion), criterion)

        return Losses(steps.total(trained(batch) for batch in step.batches()))

    def _train_on_one(self, model: nn.Module, batch: Batch, kept: Any, criterion: Criterion) -> Tensor:
        images = self.attack.apply(batch, self.placement.taken(kept))
        return steps.train_on(model, images, batch, criterion, 1.0, "main")


@dataclass(frozen=True)
class ReplayOptions:
    """Options of methods that train on a batch several times."""

    replays: int = 4
    """m: how many consecutive steps train on the same images (free-at)."""

    def check(self) -> None:
        require_count(replays=self.replays)


class FreeAT(Method):
    """Free adversarial training: trains on a batch m times; each backward pass updates both its noise and the weights.

    Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, algorithm 1: one backward pass at clip[0,1](x + δ)
    gives the weights' descent step and δ ← clip[−ε,ε](δ + α · sign ∇ₓL). δ starts at 0, belongs to a position in the
    batch rather than an image, and is never reset. A step is one update. Replays do not count towards epochs: the
    authors train for 1/m of the usual epochs, which is the usual number of steps (m = 4 and α = ε = 4/255 on ImageNet).

    Args:
        epsilon: radius of the L∞ ball, in the images' units; a number, or one value per channel.
        step: step size α of the noise; None: ``epsilon``.
        replays: m.
        bounds: lowest and highest image value, as for `SignAttack`.
    """

    name, label, colour, marker = "free-at", "FreeAT", "#BCBD22", "p"
    about = (
        "the same B images `--replays` times in a row, with a perturbation that each backward pass refines"
    )
    source = "Shafahi et al., NeurIPS 2019"
    reads = (StepOptions, ReplayOptions)
    clean_fraction = 0.0
    altered_fraction = 1.0
    new_fraction = 1.0
    single_step = True

    def __init__(
        self, epsilon: Value, step: Value | None = None, replays: int = 4, *, bounds: Bounds = UNIT
    ) -> None:
        require_count(replays=replays)
        self.ball, self.replays = Ball(epsilon, step, bounds), replays
        self.pending: list[Tensor] = []
        self._slots = Slots(1)  # one position's noise per row, updated in place

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        return cls(section.epsilon, section.attack_step or None, section.replays)

    def kept_bytes(self, steps: float) -> float:
        return 4

    def passes(self, step: Step) -> int:
        return 1

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        self._slots.reserve(step.size())
        if self.pending:
            self._slots.adopt(0, self.pending)
        elif not self._slots.rows:
            self._slots.write(0, 0, torch.zeros_like(next(iter(step.batches())).images))
        if step.number == 0:  # a new loop starts without noise
            self._slots.rows[0].zero_()
        return super().begin(model, step, criterion)

    def kind(self, step: Step) -> Hashable:
        return self._slots.version

    def offsets(self, step: Step) -> Sequence[int]:
        return (0,)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        pairs = zip(step.batches(), self._slots.parts(0, step.sizes()), strict=True)
        with norm.one_update(model):
            return Losses(steps.total(self._train(model, *pair, criterion) for pair in pairs))

    def _train(self, model: nn.Module, batch: Batch, noise: Tensor, criterion: Criterion) -> Tensor:
        shape, own = tuple(batch.images.shape[1:]), tuple(noise.shape[1:])
        allowed = f"{own} in every step, as the noise belongs to a position"
        require(shape == own, "an input's shape", shape, allowed)
        self.ball.require_inputs(batch)
        images = self.ball.clip(batch.images + noise).requires_grad_()
        loss = steps.train_on(model, images, batch, criterion, 1.0, "main")
        self.ball.project(noise.add_(self.ball.along(steps.gradient_of(images))))
        return loss

    def end(self, step: Step) -> None:
        rest = len(self._slots.rows[0]) - step.size()  # positions that a shorter batch does not have
        self.pending = self._slots.parts(0, [*step.sizes(), rest] if rest else step.sizes())

    def state_dict(self) -> dict[str, Any]:
        return {"pending": list(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = list(state["pending"])
