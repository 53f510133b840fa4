"""The batch study on CIFAR-10 with ResNet-18, batch 128 to 16K: for a GPU, over as many calls as it takes.

Regime: 30 epochs, SGD with Nesterov momentum, warm-up of 3 epochs, ε = 2/255, learning rate 0.05 · √(B/128) times a
factor of (0.5, 1, 2), chosen with one run per factor on a validation fold of the training set; 3 other seeds are
reported. Vanilla, ConAdv, recycled-equal and copy-equal at four batch sizes come first, then the rest.

    python -m analysis.cifar --data-dir DIR --minutes 25       repeat it: each call continues where the last one stopped
    python -m conadv_lab.submit sweep analysis/cifar.py:tuning --out runs/studies/cifar --data-dir DIR

Not measured yet. A cell without runs appears as "not measured" in the table.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import folds
from analysis.estimates import cell_mean
from analysis.measuring import measured, trained
from analysis.study import RESULTS, Options, existing, run_all, save
from conadv_lab.cli import asked
from conadv_lab.config import Config, new_batch, resolved
from conadv_lab.displays import markdown
from conadv_lab.launch.sweep import identity
from conadv_lab.recipes import cifar

if TYPE_CHECKING:
    import pandas as pd

NAME = "cifar"
FIRST_METHODS = ("vanilla", "conadv", "recycled-equal", "copy-equal")
METHODS = (*FIRST_METHODS, "disadv", "recycled", "copy", "noise", "noise-equal")
FIRST_BATCHES = (128, 1_024, 4_096, 16_384)
BATCHES = (*FIRST_BATCHES, 512, 2_048, 8_192)
FACTORS = (0.5, 1.0, 2.0)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
MICRO_BATCH = 2_048


@dataclass(frozen=True)
class Cell:
    """One method at one batch."""

    method: str
    global_batch: int

    def config(self, factor: float, seed: int, data_dir: str = "data") -> Config:
        batch = self.global_batch
        clean = new_batch(Config().replace(method=self.method, global_batch=batch))
        steps = round(30 * 50_000 / batch)  # equal epochs; for the equal-cost forms equal steps
        return cifar.resnet18_128().replace(
            method=self.method, global_batch=batch, micro_batch=min(clean, MICRO_BATCH), steps=steps,
            warmup_epochs=0, warmup_steps=steps // 10, lr=factor * 0.05 * (batch / 128) ** 0.5, seed=seed,
            data_dir=data_dir, log_every=100, checkpoint_every=1_000,
        )  # fmt: skip

    def tuning(self, factor: float, data_dir: str = "data") -> Config:
        return self.config(factor, TUNING_SEED, data_dir).replace(dataset=folds.CIFAR10)


def cells() -> list[Cell]:
    """The cells, most important first."""
    every = [Cell(method, batch) for batch in BATCHES for method in METHODS]
    return sorted(every, key=lambda c: c.global_batch not in FIRST_BATCHES or c.method not in FIRST_METHODS)


def tuning() -> list[Config]:
    """The tuning runs, for ``submit sweep``."""
    return [cell.tuning(factor) for cell in cells() for factor in FACTORS]


@dataclass(frozen=True)
class Asked:
    data_dir: str = "data"
    """Folder of the CIFAR-10 archive."""
    runs: Path = Path("runs/studies/cifar")
    """Parent of the run folders."""
    out: Path = RESULTS
    """Folder of the table."""
    minutes: float = 60.0
    """No run starts after this many minutes."""


def main(arguments: list[str] | None = None) -> int:
    given = asked(Asked, arguments, "python -m analysis.cifar", __doc__)
    how = Options("full", given.out, given.out, given.runs, processes=1, from_results=False, finished=False)
    until = time.monotonic() + 60 * given.minutes
    for cell in cells():
        if time.monotonic() >= until:
            break
        trials = {factor: cell.tuning(factor, given.data_dir) for factor in FACTORS}
        found = run_all(trials.values(), how, trained)
        best = max(FACTORS, key=lambda factor: found[trials[factor]]["test_accuracy"])
        for seed in SEEDS:
            if time.monotonic() < until:
                run_all([cell.config(best, seed, given.data_dir)], how, measured)
    rows = finished(given.runs, given.data_dir)
    if len(rows):
        save(NAME, given.out, rows, "full", runs=len(rows))
    print(as_table(rows))
    return 0


def finished(runs: Path, data_dir: str = "data") -> "pd.DataFrame":
    """One row per finished, measured run."""
    import json

    import pandas as pd

    known = existing(runs)
    rows = []
    for cell in cells():
        for factor in FACTORS:
            for seed in SEEDS:
                config = cell.config(factor, seed, data_dir)
                file = known.get(identity(resolved(config)), runs / "none") / "figures.json"
                if file.exists():
                    figures = json.loads(file.read_text())
                    names = ("test_accuracy", "train_test_gap", "top_eigenvalue", "trace", "adaptive_worst")
                    rows.append(
                        {"method": cell.method, "global_batch": cell.global_batch, "lr": config.optimization.lr,
                         "seed": seed, **{name: figures[name] for name in names}}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def as_table(rows: "pd.DataFrame") -> str:
    """Test accuracy of every cell as Markdown."""
    sizes = sorted(BATCHES)
    lines = []
    for method in METHODS:
        texts = []
        for batch in sizes:
            cell = {"method": method, "global_batch": batch}
            there = len(rows) and ((rows["method"] == method) & (rows["global_batch"] == batch)).any()
            texts.append(cell_mean(rows, cell, "test_accuracy") if there else "not measured")
        lines.append([method, *texts])
    return markdown(["CIFAR-10, ResNet-18, test accuracy (%)", *(f"batch {size}" for size in sizes)], lines)


if __name__ == "__main__":
    sys.exit(main())
