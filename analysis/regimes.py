"""When does an attack pay? Test accuracy over global batch and epochs, every method tuned with the same budget.

A cell is a method at one global batch and one number of epochs, read in one of three ways:

- ``epochs``: every method makes the same passes over the data;
- ``arithmetic``: vanilla takes 8/3 of the steps, which is what ConAdv's arithmetic would pay for;
- ``depth``: vanilla at 8/3 of the batch for as many steps, which is what the attack's devices could carry.

Learning rate, weight decay and, where a method moves images, ε are tuned for every cell (`analysis.tuning`): the
budget is counted in gradient evaluations of a vanilla run of the cell and is the same for all, so vanilla tries more
settings of fewer kinds. Tuning sees held-out folds alone. A run whose loss is no number any more counts as 0 %. Cells
are independent and come in groups: vanilla and ConAdv at equal epochs, vanilla's other readings, then more methods, in
each the short runs first. A group is tuned rung by rung, then run seed by seed, so that a stop at any time leaves a
balanced picture.

The small scale is a part of the map for two cores: 1,280 training images, batches of 80, 320 and 1,280, 6 and 24
epochs, arithmetic in bfloat16. Batch and epochs both step by a factor of four, so cells along a diagonal take equally
many steps: 96 at (80, 6) and (320, 24), 24 at (320, 6) and (1,280, 24). Its tuning budget is six vanilla runs a cell:
vanilla tries four settings, on one fold and the better two on a second one; ConAdv tries two, on one fold.

    python -m analysis.regimes --scale smoke                        seconds, digits
    python -m analysis.regimes --scale small --data-dir DIR --processes 2   hours on two cores, a part of CIFAR-10
    python -m analysis.regimes --scale full --data-dir DIR --minutes 9      again and again: it goes on where it was
    python -m analysis.regimes --scale small --method own.py:method  one more method, of one's own
    python -m conadv_lab.submit sweep analysis/regimes.py:pending --out runs/studies/regimes
                                                                    what can run now of the full map; again when done

Not measured yet. ``regimes.csv`` has one row a run, ``regimes_tuning.csv`` one row a trial.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import folds
from analysis.measuring import attempted
from analysis.study import RESULTS, SCALES, Figures, Options, Work, existing, run_all, save
from analysis.tuning import Candidate, Trial, affordable, candidates, search
from conadv_lab.config import Config, resolved
from conadv_lab.launch.sweep import identity
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.attack import RadiusOptions
from conadv_lab.recipes import cifar, digits

if TYPE_CHECKING:
    import pandas as pd

NAME = "regimes"
ATTACK_COST = 8 / 3
TUNING_SEED = 100
RUNS = Path("runs/studies/regimes")
Known = Callable[[Config], Figures | None]
"""From a config to the final figures of its run, None where it is not done."""


@dataclass(frozen=True)
class Scale:
    """How much of the map is run.

    Attributes:
        recipe: what is trained; images: of its training set.
        fold: the set for tuning; whole: whether a fold leaves the training set smaller, as the batch then is.
        methods: in groups, the most wanted first; vanilla's other readings follow the first.
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
    """The map's cells in groups, the most wanted group first, a group for each length."""
    arms = [[(method, "epochs") for method in methods] for methods in (*scale.methods, tuple(more))]
    arms.insert(1, [("vanilla", "arithmetic"), ("vanilla", "depth")])
    return [
        [
            Cell(scale, method, batch, epochs, equal, data_dir)
            for batch in scale.batches
            for method, equal in group
            if equal != "depth" or batch * ATTACK_COST <= scale.images
        ]
        for group in arms
        for epochs in scale.epochs
    ]


class Search:
    """A cell's tuning as far as its runs are there; ``best`` is None as long as ``next`` has to be tried."""

    def __init__(self, cell: Cell, known: Known) -> None:
        self.cell, self.drawn = cell, cell.candidates()
        self.trials: dict[Trial, Figures] = {}
        self.next: list[Trial] = []
        self.best: Candidate | None = None
        while not self.next:
            scores = {trial: (f["test_accuracy"], f["test_loss"]) for trial, f in self.trials.items()}
            wanted, best = search(len(self.drawn), scores)
            if best is not None:
                self.best = self.drawn[best]
                return
            found = {trial: known(self.config(trial)) for trial in wanted}
            self.trials |= {trial: f for trial, f in found.items() if f is not None}
            self.next = [trial for trial, f in found.items() if f is None]

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


def figures_in(runs: Path) -> Known:
    """What the run folders below ``runs`` hold now, those of ``submit sweep`` too."""
    folders = existing(runs)

    @cache
    def known(config: Config) -> Figures | None:
        folder = folders.get(identity(resolved(config)))
        files = [folder / name for name in ("figures.json", "result.json")] if folder else []
        return next((json.loads(file.read_text()) for file in files if file.exists()), None)

    return known


def tables(
    groups: Sequence[Sequence[Cell]], scale: Scale, known: Known
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """(one row a reported run, one row a trial) of what is there; whatever the order in which it was made."""
    import pandas as pd

    rows, log = [], []
    for cell in (cell for group in groups for cell in group):
        tuned = Search(cell, known)
        log += tuned.rows()
        if tuned.best is None:
            continue
        for seed in range(scale.seeds):
            config = cell.config(tuned.best, seed)
            found = known(config)
            if found is not None:
                names = ("test_accuracy", "train_accuracy", "test_loss", "train_loss", "steps")
                own = _settings(config)
                head = _named(cell) | {"seed": seed, "lr": own.pop("lr")}
                rows.append(
                    head | {name: found[name] for name in names} | own | {"gradient_evaluations": cell.cost()}
                )
    return pd.DataFrame(rows), pd.DataFrame(log)


def runnable(group: Sequence[Cell], seeds: int, known: Known) -> list[Config]:
    """What a group lacks and can run now, in order: the next rungs of tuning, or once all are tuned the seeds."""
    searches = [Search(cell, known) for cell in group]
    trials = [tuned.config(trial) for tuned in searches for trial in tuned.next]
    runs = [tuned.cell.config(tuned.best, seed) for seed in range(seeds) for tuned in searches if tuned.best]
    return trials or [run for run in runs if known(run) is None]


def pending() -> list[Config]:
    """What can be run now of the full map, in its order, for ``submit sweep``: again once these are done."""
    scale, known = MAP["full"], figures_in(RUNS)
    wanted = [config for group in cells(scale) for config in runnable(group, scale.seeds, known)]
    return list(dict.fromkeys(wanted))


class OutOfTime(Exception):
    """No further run is begun."""


def timely(config: Config, path: Path, until: float, work: Work) -> Figures:
    """What ``work`` gives if it is not later than ``until``, a time as `time.time` has it."""
    if time.time() >= until:
        raise OutOfTime
    return work(config, path)


def work_through(
    groups: Sequence[Sequence[Cell]], scale: Scale, how: Options, until: float, work: Work = attempted
) -> bool:
    """Run what is missing, in order; False where the time ended before."""
    for group in groups:
        while todo := runnable(group, scale.seeds, figures_in(how.runs)):
            try:
                run_all(todo, how, partial(timely, until=until, work=work))
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
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after this")
    given = parser.parse_args(arguments)
    out = given.out or (RESULTS if given.scale == "full" else Path("runs/studies") / given.scale)
    how = Options(given.scale, out, out, given.runs, given.processes, from_results=False, finished=False)
    scale = MAP[given.scale]
    try:
        groups = cells(scale, given.method, given.data_dir)
        done = work_through(groups, scale, how, time.time() + 60 * given.minutes)
    except (ValueError, FileNotFoundError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    rows, log = tables(groups, scale, figures_in(given.runs))
    save(NAME, out, rows, given.scale, runs=len(rows), complete=done)
    save(f"{NAME}_tuning", out, log, given.scale, trials=len(log), complete=done)
    print(f"{len(rows)} runs and {len(log)} trials, {'all' if done else 'more to come'}: {out / NAME}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
