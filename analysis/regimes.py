"""When does an attack pay? Test accuracy over global batch and epochs, every method tuned with the same budget.

A cell is a method at one global batch and one number of epochs, read in one of three ways:

- ``epochs``: every method makes the same passes over the data;
- ``arithmetic``: vanilla takes 8/3 of the steps, which is what ConAdv's arithmetic would pay for;
- ``depth``: vanilla at 8/3 of the batch for as many steps, which is what the attack's devices could carry.

Learning rate, weight decay and, where a method moves images, ε are tuned for every cell (`analysis.tuning`): the
budget is counted in gradient evaluations of a vanilla run of the cell and is the same for all, so vanilla tries more
settings of fewer kinds. Tuning sees held-out folds alone. A run whose loss is no number any more counts as 0 %. Cells
are independent; what is needed for a first look at the whole map comes first, then more seeds, then more methods, so
that a stop at any time leaves a balanced picture.

    python -m analysis.regimes --scale smoke                        seconds, digits
    python -m analysis.regimes --scale small --data-dir DIR         hours on two cores, a part of CIFAR-10
    python -m analysis.regimes --scale full --data-dir DIR --minutes 9      again and again: it goes on where it was
    python -m analysis.regimes --scale small --method own.py:method  one more method, of one's own
    python -m conadv_lab.submit sweep analysis/regimes.py:pending --out runs/studies/regimes
                                                                    what can run now of the full map; again when done

Not measured yet. ``regimes.csv`` has one row a run, ``regimes_tuning.csv`` one row a trial.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import folds
from analysis.measuring import attempted, trained
from analysis.study import RESULTS, SCALES, Figures, Options, Work, run_all, save
from analysis.tuning import Candidate, Trial, affordable, candidates, search
from conadv_lab.config import Config, resolved
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.attack import RadiusOptions
from conadv_lab.recipes import cifar, digits

if TYPE_CHECKING:
    import pandas as pd

NAME = "regimes"
ATTACK_COST = 8 / 3
TUNING_SEED = 100
RUNS = Path("runs/studies/regimes")


@dataclass(frozen=True)
class Scale:
    """How much of the map is run.

    Attributes:
        recipe: what is trained; images: of its training set.
        fold: the set for tuning; whole: whether a fold leaves the training set smaller, as the batch then is.
        methods: in groups, the most wanted first.
        budget: of a cell's tuning, in gradient evaluations of a vanilla run of the cell.
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
CONTROLS = ("disadv", "recycled", "recycled-equal", "noise", "copy")
PART = 10_000


def _part() -> Config:
    return cifar.fast_cpu().replace(train_images=PART, micro_batch=512)


def _whole() -> Config:
    return cifar.fast().replace(micro_batch=1_024)


MAP = {
    "smoke": Scale(digits.vanilla, 898, folds.DIGITS, True, (256, 898), (2.0, 4.0), (FIRST,), 2, 3.0),
    "small": Scale(
        _part, PART, folds.CIFAR10_PART, False, (512, 2_048, 10_000), (8.0, 32.0), (FIRST, CONTROLS), 3, 12.0
    ),
    "full": Scale(
        _whole, 50_000, folds.CIFAR10, True, (512, 2_048, 8_192, 50_000), (5.0, 10.0, 20.0, 40.0, 80.0),
        (FIRST, CONTROLS), 3, 16.0,
    ),
}  # fmt: skip


@cache
def _method(recipe: Callable[[], Config], name: str) -> Any:
    return method_of(resolved(recipe().replace(method=name, micro_batch=None)))


@dataclass(frozen=True)
class Cell:
    """One method at one place of the map, in one reading of equal."""

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
        """The run that is reported."""
        return self._config(candidate, seed, self.batch)

    def trial(self, candidate: Candidate, number: int) -> Config:
        """The same on a fold: as many steps, and where the fold is smaller than the set as large a part of it."""
        batch = folds.scaled(self.batch) if self.scale.whole else self.batch
        return self._config(candidate, TUNING_SEED + number, batch).replace(dataset=self.scale.fold)

    def cost(self) -> float:
        """Gradient evaluations of a run over those of vanilla at equal epochs."""
        plain = self.scale.images * self.epochs
        return self._steps() * self.batch * self._method().gradient_evaluations / plain

    def count(self) -> int:
        """How many settings are tried."""
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
    """The map's cells in groups, the most wanted group first, in a group the map's corners first."""
    groups = []
    for number, methods in enumerate((*scale.methods, tuple(more))):
        group = []
        for batch in scale.batches:
            for epochs in scale.epochs:
                group += [Cell(scale, method, batch, epochs, data_dir=data_dir) for method in methods]
                if number == 0:
                    group.append(Cell(scale, "vanilla", batch, epochs, "arithmetic", data_dir))
                    if batch * ATTACK_COST <= scale.images:
                        group.append(Cell(scale, "vanilla", batch, epochs, "depth", data_dir))
        groups.append(sorted(group, key=lambda cell: _from_corner(scale, cell)))
    return groups


def _from_corner(scale: Scale, cell: Cell) -> int:
    """0 in a corner of the map, then inwards."""
    places = (scale.batches.index(cell.global_batch), scale.epochs.index(cell.epochs))
    sizes = (len(scale.batches), len(scale.epochs))
    return sum(min(place, size - 1 - place) for place, size in zip(places, sizes, strict=True))


def order(groups: Sequence[Sequence[Cell]], seeds: int) -> Iterator[tuple[Cell, int]]:
    """Each cell once, then again with the next seed, and only then the next group."""
    for group in groups:
        for seed in range(seeds):
            yield from ((cell, seed) for cell in group)


class Search:
    """A cell's tuning as far as its runs are there."""

    def __init__(self, cell: Cell, figures: Callable[[list[Config]], dict[Config, Figures]]) -> None:
        self.cell, self.drawn = cell, cell.candidates()
        self.trials: dict[Trial, Figures] = {}
        self.best: Candidate | None = None
        while True:
            scores = {trial: (f["test_accuracy"], f["test_loss"]) for trial, f in self.trials.items()}
            self.next, best = search(len(self.drawn), scores)
            if best is not None:
                self.best = self.drawn[best]
                return
            wanted = {trial: self.config(trial) for trial in self.next}
            found = figures(list(wanted.values()))
            self.trials |= {trial: found[config] for trial, config in wanted.items() if config in found}
            if any(config not in found for config in wanted.values()):
                self.next = [trial for trial, config in wanted.items() if config not in found]
                return

    def config(self, trial: Trial) -> Config:
        return self.cell.trial(self.drawn[trial[0]], trial[1])

    def rows(self) -> list[dict[str, Any]]:
        """The log: a row a trial."""
        return [
            _named(self.cell) | _settings(self.config(trial)) | {
                "candidate": trial[0], "fold": trial[1], "chosen": self.drawn[trial[0]] == self.best,
                "validation_accuracy": f["test_accuracy"], "validation_loss": f["test_loss"],
                "gradient_evaluations": self.cell.cost(),
            }
            for trial, f in sorted(self.trials.items())
        ]  # fmt: skip


def _named(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.method,
        "global_batch": cell.global_batch,
        "epochs": cell.epochs,
        "equal": cell.equal,
    }


def _settings(config: Config) -> dict[str, Any]:
    section = config.optimization
    return {"lr": section.lr, "weight_decay": section.weight_decay, "epsilon": config.method.epsilon}


def tables(
    groups: Sequence[Sequence[Cell]], scale: Scale, how: Options
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """(one row a reported run, one row a trial) of what is there; whatever the order in which it was made."""
    import pandas as pd

    def there(configs: list[Config]) -> dict[Config, Figures]:
        return run_all(configs, how, trained)

    rows, log = [], []
    for cell in (cell for group in groups for cell in group):
        tuned = Search(cell, there)
        log += tuned.rows()
        if tuned.best is None:
            continue
        configs = {seed: cell.config(tuned.best, seed) for seed in range(scale.seeds)}
        found = there(list(configs.values()))
        for seed, config in configs.items():
            if config in found:
                names = ("test_accuracy", "train_accuracy", "test_loss", "train_loss", "steps")
                figures = {name: found[config][name] for name in names}
                own = _settings(config)
                head = _named(cell) | {"seed": seed, "lr": own.pop("lr")}
                rows.append(head | figures | own | {"gradient_evaluations": cell.cost()})
    return pd.DataFrame(rows), pd.DataFrame(log)


def pending() -> list[Config]:
    """What can be run now of the full map, in its order, for ``submit sweep``: again once these are done."""
    how = Options("full", RESULTS, RESULTS, RUNS, 1, from_results=False, finished=True)
    scale, wanted = MAP["full"], []
    for cell, seed in order(cells(scale), scale.seeds):
        tuned = Search(cell, lambda configs: run_all(configs, how, trained))
        wanted += (
            [tuned.config(trial) for trial in tuned.next]
            if tuned.best is None
            else [c for c in [cell.config(tuned.best, seed)] if c not in run_all([c], how, trained)]
        )
    return list(dict.fromkeys(wanted))


class OutOfTime(Exception):
    """No further run is begun."""


def work_through(
    groups: Sequence[Sequence[Cell]], scale: Scale, how: Options, until: float, work: Work = attempted
) -> bool:
    """Run what is missing, in order; False where the time ended before."""

    def timely(config: Config, path: Path) -> Figures:
        if time.monotonic() >= until:
            raise OutOfTime
        return work(config, path)

    try:
        for cell, seed in order(groups, scale.seeds):
            best = Search(cell, lambda configs: run_all(configs, how, timely)).best
            assert best is not None
            run_all([cell.config(best, seed)], how, timely)
    except OutOfTime:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.regimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--method", action="append", default=[], help="one more method; may be given again")
    parser.add_argument("--data-dir", default="data", help="folder of the CIFAR-10 archive")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after this")
    given = parser.parse_args(arguments)
    out = given.out or (RESULTS if given.scale == "full" else Path("runs/studies") / given.scale)
    how = Options(given.scale, out, out, given.runs, 1, from_results=False, finished=False)
    scale = MAP[given.scale]
    try:
        groups = cells(scale, given.method, given.data_dir)
        done = work_through(groups, scale, how, time.monotonic() + 60 * given.minutes)
    except (ValueError, FileNotFoundError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    there = Options(given.scale, out, out, given.runs, 1, from_results=False, finished=True)
    rows, log = tables(groups, scale, there)
    save(NAME, out, rows, given.scale, runs=len(rows), complete=done)
    save(f"{NAME}_tuning", out, log, given.scale, trials=len(log), complete=done)
    print(f"{len(rows)} runs and {len(log)} trials, {'all' if done else 'more to come'}: {out / NAME}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
