"""When does an attack pay? Test accuracy over global batch and epochs, every method tuned with the same budget.

A cell is a method at one global batch and one number of epochs, read in one of three ways:

- ``epochs``: every method makes the same passes over the data;
- ``arithmetic``: vanilla takes 8/3 of the steps, which is what ConAdv's arithmetic would pay for;
- ``depth``: vanilla at 8/3 of the batch for as many steps, which is what the attack's devices could carry.

Learning rate, weight decay and, where a method moves images, ε are tuned for every cell (`analysis.tuning`): the
budget is counted in gradient evaluations of a vanilla run of the cell and is the same for all, so vanilla tries more
settings of fewer kinds. Tuning sees held-out folds alone. A run whose loss is no number any more counts as 0 %. Cells
are independent and come in groups: at each length, short runs first, vanilla and ConAdv at equal epochs, then vanilla's
other readings; then more methods. A group is tuned rung by rung, then run seed by seed, so that a stop at any time
leaves a balanced picture.

The small scale is a part of the map for two cores: 1,280 training images, batches of 80, 320 and 1,280, 6 and 24
epochs, arithmetic in bfloat16. Batch and epochs both step by a factor of four, so cells along a diagonal take equally
many steps: 96 at (80, 6) and (320, 24), 24 at (320, 6) and (1,280, 24). Its tuning budget is six vanilla runs a cell:
vanilla tries four settings, on one fold and the better two on a second one; ConAdv tries two, on one fold.

    python -m analysis.regimes --scale smoke                        seconds, digits
    python -m analysis.regimes --scale small --data-dir DIR --processes 2   hours on two cores, a part of CIFAR-10
    python -m analysis.regimes --scale full --data-dir DIR --minutes 9      again and again: it goes on where it was
    python -m analysis.regimes --scale small --data-dir DIR --method own.py:method    one more method, of one's own
    python -m conadv_lab.submit sweep analysis/regimes.py:pending --out runs/studies/runs
                                                                    what can run now of the full map; again when done

The committed table is the small scale's. ``regimes.csv`` has one row a run, ``regimes_tuning.csv`` one row a trial.
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
"""From a config to the final figures of its run, None where it is not done."""


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
    groups: Sequence[Sequence[Cell]], name: str, known: Known
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """(one row a reported run, one row a trial) of what is there at a scale, whatever the order of its making."""
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


def measure(given: Options) -> tuple["pd.DataFrame", Figures]:
    """Run what is missing until the time is up; the table of what is there, whose tuning log is saved beside it."""
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
    """All trials that are there, and the reported runs of the cells that are tuned."""
    searches = [Search(cell, known) for group in groups for cell in group]
    trials = [tuned.config(trial) for tuned in searches for trial in tuned.trials]
    return trials + [
        tuned.cell.config(tuned.best, seed) for tuned in searches if tuned.best for seed in range(seeds)
    ]


STUDY = Study(NAME, __doc__, measure, draw, numbers, CONCLUSION, CLAIMS, Mapped, "small")

if __name__ == "__main__":
    sys.exit(STUDY.main())
