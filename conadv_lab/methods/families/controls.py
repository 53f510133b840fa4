"""Controls: any gain might come from the second half of the batch, or the second branch, instead of the attack."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from conadv_lab.methods.attack import RadiusOptions
from conadv_lab.methods.ball import UNIT, Ball, Bounds, Value
from conadv_lab.methods.base import Losses, Method, TwoBranches, WeightOptions, Weights
from conadv_lab.methods.later import hashing, norm, steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.models.norm import Branch


class _Control(TwoBranches):
    """A control: like the method it is compared with, but altered images use no gradient.

    Paired, a step trains on its own images and their altered form, as in ConAdv. At equal cost it trains on B/2 new
    images and the previous batch's, altered, as in recycled ConAdv.
    """

    def alter(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def passes(self, step: Step) -> int:
        return 1 if self.together else 2

    def kind(self, step: Step) -> Hashable:
        return "clean" if self.together and step.number == 0 else "both"

    def offsets(self, step: Step) -> Sequence[int]:
        return (-1, 0) if self.together and step.number else (0,)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        with norm.one_update(model):
            if not self.together:
                return steps.totals(self._train_on_pair(model, batch, criterion) for batch in step.batches())
            if step.number == 0:
                return Losses(steps.train_on_clean(model, step, criterion, weight=1.0, lanes=self.lanes))
            pairs = zip(step.batches(), step.batches(-1), strict=False)
            return steps.totals(
                steps.train_on_both(
                    model, own, self._altered(other, own.share), criterion, self.weights, self.lanes
                )
                for own, other in pairs
            )

    def _train_on_pair(self, model: nn.Module, batch: Batch, criterion: Criterion) -> tuple[Tensor, Tensor]:
        def trained(images: Tensor, which: int, branch: Branch) -> Tensor:
            weight = self.weights[which]
            return steps.train_on(model, images, batch, criterion, weight, branch, lanes=self.lanes)

        clean, altered = self.lanes.beside(
            lambda: trained(batch.images, 0, "main"), lambda: trained(self.alter(batch), 1, "adversarial")
        )
        return clean, altered

    def _altered(self, batch: Batch, share: float) -> Batch:
        return replace(batch, images=self.alter(batch), share=share)


class Noise(_Control):
    """Control: random signs of size ε instead of the attack, determined by (seed, epoch, image)."""

    name, label, colour, marker = "noise", "noise", "#E69F00", "^"
    about = "B clean images and the same images plus random sign noise (control)"
    reads = (RadiusOptions, WeightOptions)

    def __init__(
        self,
        epsilon: Value,
        equal_cost: bool = False,
        weights: Weights | None = None,
        seed: int = 0,
        *,
        bounds: Bounds = UNIT,
    ) -> None:
        super().__init__(weights, equal_cost)
        self.ball = Ball(epsilon, bounds=bounds)
        self.epsilon, self.seed = self.ball.epsilon, seed

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.epsilon, weights=config.method.weights, seed=config.training.seed)

    def alter(self, batch: Batch) -> Tensor:
        self.ball.require_inputs(batch)
        keys = hashing.image_keys(self.seed, "noise", batch.epochs, batch.indices)
        noise = hashing.signs(keys, batch.images[0].numel()).view(batch.images.shape)
        return self.ball.moved(batch.images, self.ball.scaled(noise.to(batch.images.dtype)))


class NoiseEqual(Noise):
    """`Noise` at equal cost, as a separate method."""

    name, label = "noise-equal", "noise-equal"
    about = "B/2 clean images and B/2 from the previous step plus random sign noise (control)"

    def __init__(
        self, epsilon: Value, weights: Weights | None = None, seed: int = 0, *, bounds: Bounds = UNIT
    ) -> None:
        super().__init__(epsilon, True, weights, seed, bounds=bounds)


class Copy(_Control):
    """Control: the same images again, unchanged, through the adversarial branch."""

    name, label, colour, marker = "copy", "copy", "#999999", "s"
    about = "B clean images and the same images again, unchanged (control)"
    reads = (WeightOptions,)

    def __init__(self, equal_cost: bool = False, weights: Weights | None = None) -> None:
        super().__init__(weights, equal_cost)

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(weights=config.method.weights)

    def alter(self, batch: Batch) -> Tensor:
        return batch.images


class CopyEqual(Copy):
    """`Copy` at equal cost, as a separate method."""

    name, label = "copy-equal", "copy-equal"
    about = "B/2 clean images and B/2 from the previous step, unchanged (control)"

    def __init__(self, weights: Weights | None = None) -> None:
        super().__init__(True, weights)
