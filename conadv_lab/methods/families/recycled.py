"""Recycled ConAdv, paired and at equal cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from conadv_lab.methods.attack import RadiusOptions
from conadv_lab.methods.ball import UNIT, Ball, Bounds, Norm, Value
from conadv_lab.methods.base import Losses, Method, TwoBranches, WeightOptions, Weights
from conadv_lab.methods.kept import Slots
from conadv_lab.methods.later import norm, steps
from conadv_lab.mistakes import require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.forwards import Criterion


class Recycled(TwoBranches):
    """Recycled ConAdv: the clean backward pass of step t also gives ∇ₓL; step t + 1 trains on x_t moved along its sign.

    Ours, not the paper's. Staleness 1 and depth 1 without an attack pass: x̂ = clip[0,1](x + ε · sign(∇ₓL)), with the
    gradient through the main branch in training mode. The first step trains on clean images only, with loss weight 1.

    Args:
        epsilon: length of the move, in the images' units; a number, or one value per channel.
        equal_cost, weights: see `TwoBranches`.
        bounds: as for `SignAttack`.
        norm: ``"l2"`` moves by ε · ∇ₓL / ‖∇ₓL‖, the norm over a whole image, and keeps 4 bytes per value.
    """

    name, label, colour, marker = "recycled", "recycled", "#009E73", "P"
    about = (
        "B clean images and the previous batch, perturbed along the input gradient saved from its clean pass"
    )
    reads: tuple[type, ...] = (RadiusOptions, WeightOptions)
    staleness = 1

    def __init__(
        self,
        epsilon: Value,
        equal_cost: bool = False,
        weights: Weights | None = None,
        *,
        bounds: Bounds = UNIT,
        norm: Norm = "linf",
    ) -> None:
        super().__init__(weights, equal_cost)
        self.ball = Ball(epsilon, bounds=bounds, norm=norm)
        require(
            self.weights[0] > 0, "weights", weights, "a clean weight above 0, as its gradient is recycled"
        )
        self.epsilon = self.ball.epsilon
        self.pending: list[Tensor] = []
        # The step that made them; None after loading: then the step before the next one.
        self._made_in: int | None = None
        self._slots = Slots(2)  # the previous step's signs, and the current step's

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.epsilon, weights=config.method.weights)

    def kept_bytes(self, steps: float) -> float:
        # A step's own are kept while it trains on those of the step before.
        return 2 / 8 if self.ball.norm == "linf" else 2 * 4

    def passes(self, step: Step) -> int:
        return 2 if self._is_pending(step) and not self.together else 1

    def _is_pending(self, step: Step) -> bool:
        """Whether there are signs from the previous step; not if it was skipped, failed or belonged to another loop."""
        return bool(self.pending) and step.number > 0 and self._made_in in (None, step.number - 1)

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        criterion = self.checked(model, step, criterion)
        self._slots.reserve(step.size())
        if self._is_pending(step):
            self.pending = self._slots.adopt(0, self.pending)
        return criterion

    def kind(self, step: Step) -> Hashable:
        return self._is_pending(step), self._slots.version

    def offsets(self, step: Step) -> Sequence[int]:
        return (-1, 0) if self._is_pending(step) else (0,)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        with norm.one_update(model):
            losses = self._trained(model, step, criterion)
        self._slots.move_up()
        return losses

    def end(self, step: Step) -> None:
        self.pending, self._made_in = self._slots.parts(0, step.sizes()), step.number

    def _trained(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        own = _numbered(step.batches())
        if not self._is_pending(step):
            return Losses(self._train_on_clean(model, own, criterion, 1.0))
        moved = self._moved(step, self._slots.parts(0, step.sizes(-1)))
        if self.together:
            pairs = zip(own, moved, strict=False)
            return steps.totals(self._train_on_both(model, *pair, criterion) for pair in pairs)
        weights = self.weights
        clean, altered = self.lanes.beside(
            lambda: self._train_on_clean(model, own, criterion, weights[0]),
            lambda: steps.total(
                steps.train_on(model, b.images, b, criterion, weights[1], "adversarial", lanes=self.lanes)
                for b in moved
            ),
        )
        return Losses(clean, altered)

    def _train_on_clean(
        self, model: nn.Module, own: Iterator[tuple[int, Batch]], criterion: Criterion, weight: float
    ) -> Tensor:
        def trained(first: int, batch: Batch) -> Tensor:
            self.ball.require_inputs(batch)
            images = batch.images.detach().requires_grad_()
            loss = steps.train_on(model, images, batch, criterion, weight, "main", lanes=self.lanes)
            self._slots.write(1, first, self.ball.keep(steps.gradient_of(images)))
            return loss

        return steps.total(trained(*one) for one in own)

    def _train_on_both(
        self, model: nn.Module, own: tuple[int, Batch], moved: Batch, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        first, clean = own
        images = clean.images.detach().requires_grad_()
        moved = replace(moved, share=clean.share)
        losses = steps.train_on_both(
            model, replace(clean, images=images), moved, criterion, self.weights, self.lanes
        )
        self._slots.write(1, first, self.ball.keep(steps.gradient_of(images)))
        return losses

    def _moved(self, step: Step, pending: list[Tensor]) -> Iterator[Batch]:
        """The previous batch, perturbed. An equal-cost step 1 uses the leading half of the larger step 0."""
        for batch, kept in zip(step.batches(-1), pending, strict=True):
            yield replace(batch, images=self.ball.moved(batch.images, self.ball.taken(kept, batch.images)))

    def state_dict(self) -> dict[str, Any]:
        return {"pending": list(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending, self._made_in = list(state["pending"]), None


class RecycledEqual(Recycled):
    """Recycled ConAdv at equal cost, as a separate method."""

    name, label = "recycled-equal", "recycled-equal"
    about = "B/2 clean images and B/2 from the previous step, perturbed as in `recycled`"

    def __init__(
        self, epsilon: Value, weights: Weights | None = None, *, bounds: Bounds = UNIT, norm: Norm = "linf"
    ) -> None:
        super().__init__(epsilon, True, weights, bounds=bounds, norm=norm)


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Each micro-batch with the number of images before it."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch.labels)
