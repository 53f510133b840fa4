"""The cells that the batch studies share: method, batch, length and learning rate.

Arms, each answering a different question:

- ``equal-epochs``: which method is best for a given number of passes over the data (the paper's question);
- ``equal-steps``: the equal-cost forms against vanilla, with the same steps, arithmetic and devices;
- ``equal-updates``: the same number of steps at every batch (Hoffer et al. 2017);
- ``equal-arithmetic``: vanilla with 8/3 of the steps, which the attack's arithmetic would pay for;
- ``equal-depth``: vanilla at 8/3 of the batch, which the attack's devices could handle, for as many steps.

Every cell has its own learning rate from one grid, chosen by accuracy on validation folds of the training set, with
seeds that are not reported. The runs can also be sent to a cluster; the studies find them there:

    python -m conadv_lab.submit sweep analysis/arms.py:tuning --out runs/studies/runs
    python -m conadv_lab.submit sweep analysis/arms.py:reported --out runs/studies/runs
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis import folds
from analysis.measuring import trained
from analysis.study import RESULTS, Figures, Options, run_all, save, table
from conadv_lab.config import Config
from conadv_lab.recipes import digits

if TYPE_CHECKING:
    import pandas as pd

TRAIN_IMAGES = 898
PAIRED = ("vanilla", "copy", "noise", "disadv", "conadv", "recycled")
EQUAL_COST = ("copy-equal", "noise-equal", "recycled-equal")
AT_DEPTH = ("vanilla", "copy", "noise", "conadv")
AT_UPDATES = ("vanilla", "copy", "conadv", "copy-equal", "recycled-equal")
ATTACK_COST = 8 / 3
LEARNING_RATES = "learning_rates"


@dataclass(frozen=True)
class Cell:
    """One method at one batch in one arm."""

    arm: str
    method: str
    global_batch: int
    steps: int

    def config(self, lr: float, seed: int) -> Config:
        return _config(self.method, self.global_batch, self.steps, lr, seed)

    def tuning(self, lr: float, seed: int) -> Config:
        """As many steps on four fifths of the training images, with four fifths of the batch."""
        batch = folds.scaled(self.global_batch)
        return _config(self.method, batch, self.steps, lr, seed).replace(dataset=folds.DIGITS)


@dataclass(frozen=True)
class Scale:
    """The size of a study: batches of the equal-epochs arms, and seeds by batch."""

    batches: tuple[int, ...]
    epochs: int
    updates: int
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: int
    seeds_of_smaller: int
    paired: tuple[str, ...] = PAIRED
    equal_cost: tuple[str, ...] = EQUAL_COST

    @property
    def largest(self) -> int:
        return max(self.batches)

    @property
    def third(self) -> int:
        """The largest batch whose 8/3 still fits the set."""
        return int(self.largest / ATTACK_COST)

    def seeds_of(self, cell: Cell) -> range:
        many = cell.global_batch == self.largest or cell.arm == "equal-depth"
        return range(self.seeds if many else self.seeds_of_smaller)


RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
SMALL_METHODS: dict[str, Any] = {
    "paired": ("vanilla", "copy", "conadv"),
    "equal_cost": ("copy-equal", "recycled-equal"),
}
SCALES = {
    "smoke": Scale((256, 898), 2, 4, (0.2, 0.4), (100,), 2, 2, **SMALL_METHODS),
    "small": Scale((64, 898), 16, 56, (0.1, 0.2, 0.4), (100, 101), 3, 2, **SMALL_METHODS),
    "full": Scale((64, 256, 898), 16, 56, RATES, (100, 101, 102), 10, 3),
}


def cells(scale: Scale) -> list[Cell]:
    """All cells of a scale, most important first: the largest batch, then the arms, then smaller batches."""
    largest, third = scale.largest, scale.third
    steps = {batch: round(scale.epochs * TRAIN_IMAGES / batch) for batch in (*scale.batches, third)}
    planned = []
    for batch in sorted(scale.batches, reverse=True):
        planned += [Cell("equal-epochs", method, batch, steps[batch]) for method in scale.paired]
        planned += [
            Cell("equal-steps", method, batch, steps[batch]) for method in ("vanilla", *scale.equal_cost)
        ]
        if batch == largest:
            planned.append(Cell("equal-arithmetic", "vanilla", largest, round(ATTACK_COST * steps[largest])))
            planned += [
                Cell("equal-depth", method, third, steps[third])
                for method in scale.paired
                if method in AT_DEPTH
            ]
            planned.append(Cell("equal-depth", "vanilla", round(ATTACK_COST * third), steps[third]))
    for batch in scale.batches:
        planned += [
            Cell("equal-updates", method, batch, scale.updates)
            for method in (*scale.paired, *scale.equal_cost)
            if method in AT_UPDATES
        ]
    return planned


def tune(given: Options) -> None:
    """Choose each cell's learning rate on validation folds and write the whole grid to ``learning_rates.csv``."""
    import pandas as pd

    scale = SCALES[given.scale]
    planned = cells(scale)
    configs = {
        (cell, lr, seed): cell.tuning(lr, seed)
        for cell in planned for lr in scale.rates for seed in scale.tuning_seeds
    }  # fmt: skip
    found = run_all(configs.values(), given, trained)
    rows = []
    for cell in planned:
        lines = []
        for lr in scale.rates:
            trials = [configs[cell, lr, seed] for seed in scale.tuning_seeds]
            if all(trial in found for trial in trials):
                lines.append(_line(cell, lr, [found[trial] for trial in trials]))
        rows += lines if len(lines) == len(scale.rates) else []  # never choose a rate from an incomplete grid
    seconds = sum(figures["seconds"] for figures in found.values())
    facts = {"runs": len(found), "run_seconds": round(seconds)}
    save(LEARNING_RATES, given.out, pd.DataFrame(rows), given.scale, **facts)


def _line(cell: Cell, lr: float, trials: list[Figures]) -> dict[str, Any]:
    return {
        "arm": cell.arm, "method": cell.method, "global_batch": cell.global_batch, "steps": cell.steps,
        "lr": lr, "folds": len(trials),
        "validation_accuracy": sum(figures["test_accuracy"] for figures in trials) / len(trials),
        "validation_loss": sum(figures["test_loss"] for figures in trials) / len(trials),
    }  # fmt: skip


def best_rates(grid: "pd.DataFrame") -> dict[Cell, float]:
    """Each cell's learning rate with the highest validation accuracy; ties go to the lower loss."""
    ordered = grid.sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    best: dict[Cell, float] = {}
    for row in ordered.to_dict("records"):
        cell = Cell(row["arm"], row["method"], int(row["global_batch"]), int(row["steps"]))
        best.setdefault(cell, row["lr"])
    return best


def tuning() -> list[Config]:
    """The tuning runs of the full scale, each once, for ``submit sweep``."""
    scale = SCALES["full"]
    made = [c.tuning(lr, s) for c in cells(scale) for lr in scale.rates for s in scale.tuning_seeds]
    return list(dict.fromkeys(made))


def reported() -> list[Config]:
    """The reported runs of the full scale, each once, for ``submit sweep``; needs the tuned learning rates."""
    best = best_rates(table(LEARNING_RATES, RESULTS))
    scale = SCALES["full"]
    return list(dict.fromkeys(c.config(best[c], seed) for c in cells(scale) for seed in scale.seeds_of(c)))


def _config(method: str, batch: int, steps: int, lr: float, seed: int) -> Config:
    return digits.vanilla().replace(
        method=method,
        global_batch=batch,
        steps=steps,
        # In steps, so that equal-cost forms, whose epochs are half as long, warm up like the others.
        warmup_steps=round(steps / 8),
        lr=lr,
        seed=seed,
        log_every=1_000_000,
        checkpoint_every=1_000_000,
    )
