"""When does an attack pay? Test accuracy over global batch and epochs, every method tuned with the same budget.

A cell is a method at one global batch and one number of epochs, compared in one of three ways:

- ``epochs``: every method makes the same passes over the data;
- ``arithmetic``: vanilla takes 8/3 of the steps, which is what ConAdv's arithmetic would pay for;
- ``depth``: vanilla at 8/3 of the batch for as many steps, which is what the attack's devices could carry.

Learning rate, weight decay and, where a method moves images, ε are tuned for every cell (`analysis.tuning`): the
budget is counted in gradient evaluations of a vanilla run of the cell and is the same for all, so vanilla tries more
settings of fewer kinds. Tuning sees only held-out folds. A run whose loss becomes NaN or infinite counts as 0 %. Cells
are independent and come in groups: for each number of epochs, short runs first, vanilla and ConAdv at equal epochs,
then vanilla's other comparisons; then more methods. A group is tuned rung by rung, then run seed by seed, so that a
stop at any time leaves a balanced picture.

The small scale is a part of the map for two cores: 1,280 training images, batches of 80, 320 and 1,280, 6 and 24
epochs, arithmetic in bfloat16. Batch and epochs both step by a factor of four, so cells along a diagonal take equally
many steps: 96 at (80, 6) and (320, 24), 24 at (320, 6) and (1,280, 24). Its tuning budget is six vanilla runs a cell:
vanilla tries four settings, on one fold and the better two on a second one; ConAdv tries two, on one fold.

    python -m analysis.regimes --scale smoke                        seconds, digits
    python -m analysis.regimes --scale small --data-dir DIR --processes 2   hours on two cores, a part of CIFAR-10
    python -m analysis.regimes --scale full --data-dir DIR --minutes 9      repeat it: each call continues
    python -m analysis.regimes --scale small --data-dir DIR --method own.py:method    adds your own method
    python -m conadv_lab.submit sweep analysis/regimes.py:pending --out runs/studies/runs
                                                   the part of the full map that can run now; repeat when it is done

The committed table has the small scale. ``regimes.csv`` has one row per run, ``regimes_tuning.csv`` one per trial.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.measuring import attempted
from analysis.regime_cells import MAP, Cell, Scale, cells
from analysis.regimes_told import CLAIMS, CONCLUSION, draw, numbers
from analysis.study import Figures, Mapped, Options, Study, Work, commits_of, existing, run_all, save
from analysis.tuning import Candidate, Trial, search
from conadv_lab.config import Config, resolved
from conadv_lab.launch.sweep import identity

if TYPE_CHECKING:
    import pandas as pd

NAME = "regimes"
FOUND = ("test_accuracy", "train_accuracy", "test_loss", "train_loss", "steps")
COLUMNS = (
    "method", "global_batch", "epochs", "equal", "seed", "lr", *FOUND,
    "weight_decay", "epsilon", "gradient_evaluations", "scale",
)  # fmt: skip
RUNS = Path("runs/studies/runs")
Known = Callable[[Config], Figures | None]
"""From a config to its run's final metrics, or None if the run is not finished."""


class Search:
    """A cell's tuning so far, from the runs on disk; ``best`` is None while trials in ``next`` remain."""

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
        """The log, one row per trial."""
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
    """The results in the run folders below ``runs``, including those sent by ``submit sweep``."""
    folders = existing(runs)

    @cache
    def known(config: Config) -> Figures | None:
        folder = folders.get(identity(resolved(config)))
        files = [folder / name for name in ("figures.json", "result.json")] if folder else []
        return next((json.loads(file.read_text()) for file in files if file.exists()), None)

    return known


def tables(
    groups: Sequence[Sequence[Cell]], name: str, known: Known
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """(one row per reported run, one row per trial) on disk at a scale, whatever order they ran in."""
    import pandas as pd

    rows, log = [], []
    for cell in (cell for group in groups for cell in group):
        tuned = Search(cell, known)
        log += tuned.rows()
        if tuned.best is None:
            continue
        for seed in range(cell.scale.seeds):
            config = cell.config(tuned.best, seed)
            found = known(config)
            if found is not None:
                rows.append(
                    _named(cell) | _settings(config) | {figure: found[figure] for figure in FOUND}
                    | {"seed": seed, "gradient_evaluations": cell.cost(), "scale": name}
                )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(log)


def runnable(group: Sequence[Cell], seeds: int, known: Known) -> list[Config]:
    """What a group lacks and can run now, in order: the next tuning rungs, or the seeds once all are tuned."""
    searches = [Search(cell, known) for cell in group]
    trials = [tuned.config(trial) for tuned in searches for trial in tuned.next]
    runs = [tuned.cell.config(tuned.best, seed) for seed in range(seeds) for tuned in searches if tuned.best]
    return trials or [run for run in runs if known(run) is None]


def pending() -> list[Config]:
    """The part of the full map that can run now, in order, for ``submit sweep``; repeat once it is done."""
    scale, known = MAP["full"], figures_in(RUNS)
    wanted = [config for group in cells(scale) for config in runnable(group, scale.seeds, known)]
    return list(dict.fromkeys(wanted))


class OutOfTime(Exception):
    """Time is up: no further run starts."""


def timely(config: Config, path: Path, until: float, work: Work) -> Figures:
    """The result of ``work``, unless it is later than ``until``, in seconds like `time.time`."""
    if time.time() >= until:
        raise OutOfTime
    return work(config, path)


def work_through(
    groups: Sequence[Sequence[Cell]], scale: Scale, how: Options, until: float, work: Work = attempted
) -> bool:
    """Run what is missing, in order; False if time ran out first."""
    for group in groups:
        while todo := runnable(group, scale.seeds, figures_in(how.runs)):
            try:
                run_all(todo, how, partial(timely, until=until, work=work))
            except OutOfTime:
                return False
    return True


def measure(given: Options) -> tuple["pd.DataFrame", Figures]:
    """Run what is missing until time is up; returns the table of finished runs and saves the tuning log beside it."""
    scale = MAP[given.scale]
    groups = cells(scale, given.method, given.data_dir)
    if not given.finished:
        work_through(groups, scale, given, time.time() + 60 * given.minutes)
    known = figures_in(given.runs)
    rows, log = tables(groups, given.scale, known)
    facts = {
        "command": f"python -m analysis.{NAME} --scale {given.scale} --data-dir DIR",
        "commit": commits_of(made(groups, scale.seeds, known), given.runs),
        "complete": not any(runnable(group, scale.seeds, known) for group in groups),
    }
    save(f"{NAME}_tuning", given.out, log, given.scale, **facts)
    return rows, facts


def made(groups: Sequence[Sequence[Cell]], seeds: int, known: Known) -> list[Config]:
    """All trials on disk, and the reported runs of the tuned cells."""
    searches = [Search(cell, known) for group in groups for cell in group]
    trials = [tuned.config(trial) for tuned in searches for trial in tuned.trials]
    return trials + [
        tuned.cell.config(tuned.best, seed) for tuned in searches if tuned.best for seed in range(seeds)
    ]


STUDY = Study(NAME, __doc__, measure, draw, numbers, CONCLUSION, CLAIMS, Mapped, "small")

if __name__ == "__main__":
    sys.exit(STUDY.main())
