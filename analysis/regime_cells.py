"""The cells of the map of regimes: a method at one global batch and one number of epochs, for one comparison.

`analysis.regimes` explains the comparisons and runs the cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from analysis import folds
from analysis.arms import ATTACK_COST
from analysis.tuning import Candidate, affordable, candidates
from conadv_lab.config import Config, resolved
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.attack import RadiusOptions
from conadv_lab.recipes import cifar, digits

TUNING_SEED = 100


@dataclass(frozen=True)
class Scale:
    """The size of the map.

    Attributes:
        recipe: what is trained; images: the size of its training set.
        fold: the data set for tuning; whole: whether a fold shrinks the training set, and the batch with it.
        methods: in groups, most important first; vanilla's other comparisons follow the first group.
        budget: for tuning one cell, in gradient evaluations of a vanilla run of the cell.
    """

    recipe: Callable[[], Config]
    images: int
    fold: str
    whole: bool
    batches: tuple[int, ...]
    epochs: tuple[float, ...]
    methods: tuple[tuple[str, ...], ...]
    seeds: int
    budget: float


FIRST = ("vanilla", "conadv")
GROUPS = (FIRST, ("recycled", "noise"), ("disadv", "recycled-equal", "copy"))
PART = 1_280


def _part() -> Config:
    return cifar.fast_cpu().replace(train_images=PART, micro_batch=320, precision="bfloat16", threads=1)


def _whole() -> Config:
    return cifar.fast().replace(micro_batch=1_024)


MAP = {
    "smoke": Scale(digits.vanilla, 898, folds.DIGITS, True, (256, 898), (2.0, 4.0), (FIRST,), 2, 3.0),
    "small": Scale(_part, PART, folds.CIFAR10_PART, False, (80, 320, 1_280), (6.0, 24.0), GROUPS, 3, 6.0),
    "full": Scale(
        _whole, 50_000, folds.CIFAR10, True, (512, 2_048, 8_192, 50_000), (5.0, 10.0, 20.0, 40.0, 80.0),
        GROUPS, 3, 16.0,
    ),
}  # fmt: skip


def _lars(recipe: Callable[[], Config]) -> Config:
    """The recipe with LARS. Its rate is the best of eight, tried with vanilla on the part of CIFAR-10's fold."""
    return recipe().replace(
        optimizer="lars", lars_variant="C", nesterov=False, momentum=0.9, bias_lr_factor=1.0,
        lr=None, base_lr=25.0, base_batch=512, weight_decay=1e-4,
    )  # fmt: skip


_part_lars = partial(_lars, _part)
_digits_lars = partial(_lars, digits.vanilla)


def _attempts(place: Scale, lars: Callable[[], Config], budget: float) -> dict[str, Scale]:
    """Where else ConAdv might pay, from the map's largest batch at its longer length."""
    return {
        "tuned": replace(place, budget=budget),
        "lars": replace(place, recipe=lars, budget=budget),
        "longer": replace(place, epochs=(4 * place.epochs[0],)),
    }


ATTEMPTS = {
    "smoke": _attempts(replace(MAP["smoke"], batches=(898,), epochs=(2.0,)), _digits_lars, 4.0),
    "small": _attempts(replace(MAP["small"], batches=(PART,), epochs=(24.0,)), _part_lars, 13.4),
}
"""By scale and name. The larger budget tries seven settings of vanilla, and three of ConAdv on two folds."""


@cache
def _method(recipe: Callable[[], Config], name: str) -> Any:
    return method_of(resolved(recipe().replace(method=name, micro_batch=None)))


@dataclass(frozen=True)
class Cell:
    """One method at one place of the map, for one comparison."""

    scale: Scale = field(repr=False)
    method: str
    global_batch: int
    epochs: float
    equal: str = "epochs"
    data_dir: str = "data"

    @property
    def batch(self) -> int:
        return round(self.global_batch * (ATTACK_COST if self.equal == "depth" else 1))

    def config(self, candidate: Candidate, seed: int) -> Config:
        """The reported run."""
        return self._config(candidate, seed, self.batch)

    def trial(self, candidate: Candidate, number: int) -> Config:
        """The same on a fold: as many steps; if the fold is smaller, the batch shrinks in proportion."""
        batch = folds.scaled(self.batch) if self.scale.whole else self.batch
        return self._config(candidate, TUNING_SEED + number, batch).replace(dataset=self.scale.fold)

    def cost(self) -> float:
        """Gradient evaluations of a run, relative to vanilla at equal epochs."""
        plain = self.scale.images * self.epochs
        return self._steps() * self.batch * self._method().gradient_evaluations / plain

    def count(self) -> int:
        """The number of settings to try."""
        return affordable(self.scale.budget, self.cost())

    def candidates(self) -> list[Candidate]:
        kind = METHODS.get(self.method)
        moves = kind is None or any(issubclass(part, RadiusOptions) for part in kind.reads)
        return candidates(self.count(), 0, tunes_epsilon=moves)

    def _method(self) -> Any:
        return _method(self.scale.recipe, self.method)

    def _steps(self) -> int:
        method, longer = self._method(), ATTACK_COST if self.equal == "arithmetic" else 1
        new = self.global_batch * method.new_fraction / method.replays
        return max(1, round(longer * self.epochs * self.scale.images / new))

    def _config(self, candidate: Candidate, seed: int, batch: int) -> Config:
        recipe, steps = self.scale.recipe(), self._steps()
        default = recipe.optimization
        plain = default.lr or default.base_lr * (self.batch / default.base_batch) ** 0.5
        micro_batch = recipe.training.micro_batch
        if micro_batch is not None:
            micro_batch = min(micro_batch, round(batch * min(1, self._method().new_fraction)))
        return recipe.replace(
            method=self.method,
            global_batch=batch,
            micro_batch=micro_batch,
            steps=steps,
            warmup_epochs=0.0,
            warmup_steps=round(steps / 5),
            lr=candidate.lr * plain,
            weight_decay=candidate.weight_decay * default.weight_decay,
            epsilon=candidate.epsilon * recipe.method.epsilon,
            seed=seed,
            data_dir=self.data_dir,
            log_every=1_000_000,
            checkpoint_every=1_000_000,
        )


def cells(scale: Scale, more: Sequence[str] = (), data_dir: str = "data") -> list[list[Cell]]:
    """The map's cells in groups of equal epochs, most important first: ConAdv's comparisons, then short runs."""
    first, *others = ([(method, "epochs") for method in methods] for methods in (*scale.methods, tuple(more)))
    readings = [("vanilla", "arithmetic"), ("vanilla", "depth")]
    order = [(arms, epochs) for epochs in scale.epochs for arms in (first, readings)]
    order += [(arms, epochs) for arms in others for epochs in scale.epochs]
    return [
        [
            Cell(scale, method, batch, epochs, equal, data_dir)
            for batch in scale.batches
            for method, equal in arms
            if equal != "depth" or batch * ATTACK_COST <= scale.images
        ]
        for arms, epochs in order
    ]
