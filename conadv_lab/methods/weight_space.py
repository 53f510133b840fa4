"""Weight-space relatives of ConAdv: move the weights before computing the gradient, then restore them.

A family only defines the move: see `conadv_lab.methods.families.sam`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from conadv_lab.methods.alone import ALONE, Gradients
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, norm, steps, torch
from conadv_lab.mistakes import require_number, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.methods.moving import Move, Part, Run, Weights

Whose = Literal["global", "micro-batch", "rank"]
WHOSE: tuple[Whose, ...] = ("global", "micro-batch", "rank")


@dataclass(frozen=True)
class RhoOptions:
    """Options of sharpness-aware methods."""

    rho: float | None = None
    """Radius ρ by which the weights are moved, as L2 norm over all of them; None: the method's default."""

    def check(self) -> None:
        if self.rho is not None:
            require_number(rho=self.rho)


@dataclass(frozen=True)
class PerturbationOptions:
    """Options of methods that may move the weights separately for parts of a step."""

    perturbation: Literal["global", "micro-batch", "rank"] | None = None
    """Whose gradient moves the weights: the whole step's, each micro-batch's or each rank's; None: method's default."""

    def check(self) -> None:
        if self.perturbation is not None and self.perturbation not in WHOSE:
            raise unknown("perturbation", str(self.perturbation), WHOSE)


class WeightSpace(Method):
    """Base class: computes a step's gradient at w + e and applies it to w. A family defines e.

    Common to all:

    - The weights are restored bitwise from a copy (`conadv_lab.methods.moving.Weights` says why).
    - Only the first pass over a batch updates running statistics, as in SAM's own code; counting a second pass, at
      weights that are never kept, is a known cause of divergence. Branches of a mixture norm need no special care:
      parameters without a gradient do not move.
    - The optimizer's weight decay acts at w, outside the loss, as in SAM's equation (Foret et al. 2021, section 2),
      unless a family says otherwise. SAM's own code has it inside both losses.
    - If a pass is not finite, the whole step is skipped: there is no gradient, for which every optimizer here does
      nothing, running statistics and state for later steps are unchanged, and ``left_out`` counts it. On a GPU, where
      the host does not check, every gradient is NaN then, and the next check of the loss ends the run.
    - ``perturbation`` selects the gradient that moves the weights. ``global``, the whole step's, does not depend on the
      split over micro-batches and ranks. SAM's own code moves each device's weights by its own gradient: ``rank``.
      ``micro-batch`` gives the same result for any number of ranks.

    Attributes:
        radius: default ρ.
        own_perturbation: default perturbation.
        perturbations: allowed perturbations.
        keeps: how many gradients of earlier steps are kept.
    """

    radius: ClassVar[float] = 0.05
    own_perturbation: ClassVar[Whose] = "global"
    perturbations: ClassVar[tuple[Whose, ...]] = WHOSE
    keeps: int = 0
    copies: float = 2
    marker = "p"

    def __init__(self, rho: float | None = None, perturbation: Whose | None = None) -> None:
        rho = self.radius if rho is None else rho
        require_number(rho=rho)
        perturbation = perturbation or self.own_perturbation
        if perturbation not in WHOSE:
            raise unknown("perturbation", str(perturbation), WHOSE)
        if perturbation not in self.perturbations:
            raise ValueError(
                f"perturbation is {perturbation!r}; allowed for {self.name}: {', '.join(self.perturbations)}"
            )
        self.rho, self.perturbation = rho, perturbation
        self._weights: Weights | None = None
        self._kept: list[list[list[Tensor]]] = []  # by part, by age, by weight
        self._version = 0  # of its tensors, which a captured step reads and writes
        self._left_out: Step | None = None

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho, config.method.perturbation)

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        options = {"rho": cls.radius, "perturbation": cls.own_perturbation}
        own = {field.name for part in cls.reads for field in fields(part)}
        return {name: value for name, value in options.items() if name in own}

    def attach(self, optimizer: Optimizer | None, gradients: Gradients = ALONE) -> None:
        if gradients.spread and self.perturbation == "micro-batch":
            raise ValueError(
                "perturbation is 'micro-batch'; allowed with batch_norm 'sync' over several ranks: 'global' or 'rank', "
                "as micro-batches are split over ranks"
            )
        super().attach(optimizer, gradients)

    def needed_optimizer(self) -> Optimizer:
        """The optimizer passed to `attach`; see `optimizer_of`."""
        return optimizer_of(self)

    def advance(self, step: Step) -> None:
        """Called on the host after a step that was not skipped."""

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        """Add the part's gradient; returns its losses, and what to keep for later steps.

        By default the gradient at the stale move, which is added and kept.
        """
        move = self.stale_move(part, step)
        if move is None:
            raise NotImplementedError
        losses, gradient = part.at(move, counted=True)
        part.give(gradient)
        return losses, gradient

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        criterion = super().begin(model, step, criterion)
        if self._weights is None or self._weights.model is not model:
            self._weights = moving.Weights(model)
        self._make_room(1)
        if step.number == 0:  # another loop
            self.forget()
        return criterion

    def _make_room(self, parts: int) -> None:
        """Allocate tensors for what is kept, if none were loaded."""
        assert self._weights is not None
        for _ in range(parts - len(self._kept)):
            self._kept.append([self._weights.zeros() for _ in range(self.keeps)])
            self._version += 1

    def forget(self) -> None:
        """Forget everything kept from earlier steps."""
        for part in self._kept:
            for tensors in part:
                torch._foreach_zero_(tensors)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        assert self._weights is not None
        weights = self._weights
        before = weights.taken()
        found = []
        try:
            with norm.one_update(model):
                for part in self._parts(model, step, criterion):
                    found.append((*self.of_part(part, step), part.kept))
                self._require_finite(weights, [gradient for _, gradient, _ in found])
        except _NotFinite:
            weights.taken()
            self.left_out += 1
            self._left_out = step
        else:
            for _, gradient, kept in found:
                if gradient is not None:
                    moving.shift(kept, gradient)
        weights.give(before)
        return _sum([losses for losses, _, _ in found])

    def end(self, step: Step) -> None:
        if self._left_out is not step:
            self.advance(step)
        self._left_out = None

    def _parts(self, model: nn.Module, step: Step, criterion: Criterion) -> Iterator[Part]:
        """The step's parts, one after another."""
        assert self._weights is not None
        rank, ranks = (0, 1) if self.perturbation == "global" else (self.gradients.rank, self.gradients.ranks)
        for number, run in enumerate(self.runs(model, step, criterion)):
            self._make_room(number + 1)
            yield moving.Part(
                self._weights, run, self.gradients, self.perturbation == "global", self._kept[number],
                number * ranks + rank, self.perturbation == "micro-batch",
            )  # fmt: skip

    def runs(self, model: nn.Module, step: Step, criterion: Criterion) -> Iterator[Run]:
        """A pass for each part of the step."""
        if self.perturbation != "micro-batch":
            yield self.run(model, step.batches, criterion)
            return
        for batch in step.batches():
            yield self.run(model, partial(iter, [batch]), criterion)

    def run(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], criterion: Criterion) -> Run:
        """A pass over micro-batches, which are requested anew each time."""

        def trained(counted: bool) -> Losses:
            losses = (
                steps.train_on(model, b.images, b, criterion, 1.0, "main", counted=counted) for b in batches()
            )
            return Losses(steps.total(losses))

        return trained

    def _require_finite(self, weights: Weights, kept: Sequence[list[Tensor] | None]) -> None:
        """On a CPU, raise unless everything on which all ranks agree is finite; a GPU would have to synchronise."""
        if not weights.on_cpu or (self.gradients.ranks > 1 and self.perturbation != "global"):
            return
        # A kept tensor may be an added one; check it only once.
        looked_at = {id(one): one for some in (weights.gradients(), *kept) for one in some or ()}
        if looked_at and not bool(torch.isfinite(moving.norm(list(looked_at.values())))):
            raise _NotFinite

    def kind(self, step: Step) -> Hashable | None:
        return self.name, self._version

    def offsets(self, step: Step) -> Sequence[int]:
        return (0,)

    def passes(self, step: Step) -> int:
        return 1

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kept": self._kept} if self.keeps and self._kept else {}
        state |= {"left_out": self.left_out} if self.left_out else {}
        return {"shared" if self.perturbation == "global" else "own": state} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = state.get("shared") or state.get("own") or {}
        self._kept = [[list(tensors) for tensors in part] for part in found.get("kept", [])]
        self._version += 1
        self.left_out = found.get("left_out", 0)

    def stale_move(self, part: Part, step: Step) -> Move | None:
        """The move that was decided before this step's images were seen; None if there is none."""
        return None

    def probe(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[str, float]:
        """How stale the move is: its cosine with the current gradient, and the fraction of the gain that remains.

        The gain is how much the move raises the step's loss, relative to a fresh move of the same length along the
        gradient. Costs three gradients and changes nothing. With several parts it uses the first one.
        """
        criterion = self.begin(model, step, criterion)
        part = next(self._parts(model, step, criterion))
        move = self.stale_move(part, step)
        if move is None or float(moving.length(move)) == 0:
            return {}
        losses, fresh = part.here(counted=False)
        own = moving.along(fresh, float(moving.length(move)))
        cosine = moving.inner(move.direction, fresh) * move.scale / (moving.length(move) * moving.norm(fresh))
        losses_at = [part.at(one, counted=False)[0] for one in (move, own)]
        whole = [self.gradients.sum(float(one.clean)) for one in (losses, *losses_at)]
        gained = whole[2] - whole[0]
        return {
            "ascent_cosine": float(cosine),
            "ascent_gain_left": (whole[1] - whole[0]) / gained if gained else 0.0,
        }


def optimizer_of(method: Method) -> Optimizer:
    """The optimizer attached to a method.

    Raises:
        ValueError: none was attached.
    """
    if method.optimizer is None:
        raise ValueError(
            f"{type(method).__name__} has no optimizer; call method.attach(optimizer) before the first step"
        )
    return method.optimizer


class _NotFinite(ArithmeticError):
    """A pass of the step was not finite."""


def _sum(losses: Sequence[Losses]) -> Losses:
    altered = [one.adversarial for one in losses if one.adversarial is not None]
    return Losses(steps.total(one.clean for one in losses), steps.total(altered) if altered else None)
