"""What ``make demo`` runs: every method on real digits at a small and a large batch size, and a report."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from conadv_lab.cli import parsed
from conadv_lab.config import Config, resolved
from conadv_lab.cores import cores
from conadv_lab.launch.sweep import identity
from conadv_lab.methods import method_of
from conadv_lab.mistakes import creatable
from conadv_lab.pipes import outlive_readers
from conadv_lab.pool import worked
from conadv_lab.recipes import digits

BATCHES = (64, 898)
MORE_BATCHES = (256,)
"""Extra batch size of the full demo."""
EPOCHS = 16
WARMUP_EPOCHS = 2
LEARNING_RATES = (0.1, 0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)
CURVATURE_IMAGES = 256
EQUAL_ARITHMETIC = 8 / 3
PAIRED = ("vanilla", "copy", "noise", "disadv", "conadv", "recycled")
EQUAL_COST = ("copy-equal", "noise-equal", "recycled-equal")
GRID_FILE = "demo_grid.csv"


@dataclass(frozen=True)
class Cell:
    """One method at one batch in one arm of the comparison."""

    method: str
    arm: str
    global_batch: int
    steps: int

    def config(self, lr: float, seed: int) -> Config:
        recipe = digits.vanilla()
        return recipe.replace(
            method=self.method,
            global_batch=self.global_batch,
            steps=self.steps,
            # In steps, so that equal-cost forms, whose epochs have half as many steps, warm up like the others.
            warmup_steps=_steps(WARMUP_EPOCHS, self.global_batch),
            lr=lr,
            seed=seed,
            log_every=1_000_000,
            checkpoint_every=1_000_000,
        )


def cells(full: bool = True) -> list[Cell]:
    """The demo's cells: equal epochs, equal steps at equal cost, and equal arithmetic at the largest batch."""
    planned = []
    for batch in sorted((*BATCHES, *MORE_BATCHES)) if full else BATCHES:
        steps = _steps(EPOCHS, batch)
        planned += [Cell(method, "equal-epochs", batch, steps) for method in PAIRED]
        planned += [Cell(method, "equal-steps", batch, steps) for method in ("vanilla", *EQUAL_COST)]
    largest = max(BATCHES)
    planned.append(
        Cell("vanilla", "equal-arithmetic", largest, round(EQUAL_ARITHMETIC * _steps(EPOCHS, largest)))
    )
    return planned


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo."""

    out: Path = Path("runs/demo")
    """Folder for the report and the runs."""
    full: bool = False
    """Also train at a third batch size: half as many runs again."""
    tune: bool = False
    """Tune the learning rates again (takes long)."""


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parsed(DemoOptions, words, "conadv_lab.demo", __doc__)
        creatable(options.out)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    started = time.monotonic()
    if options.tune:
        tune(options.out.with_name("demo-grid"))
        return 0
    best = best_learning_rates()
    jobs = {cell: [(cell, best[_key(cell)], seed) for seed in SEEDS] for cell in cells(options.full)}
    results = run_all((job for own in jobs.values() for job in own), options.out / "runs", train_and_measure)
    rows = [_row(cell, best[_key(cell)], [results[job] for job in own]) for cell, own in jobs.items()]
    summary = {"seconds": round(time.monotonic() - started, 1), "rows": rows}
    from conadv_lab.demo_report import print_table, write_report
    from conadv_lab.files import write_json

    write_json(options.out / "summary.json", summary)
    write_report(options.out / "report.html", summary, grid())
    print_table(rows)
    print(f"{summary['seconds']} s; report: {options.out / 'report.html'}")
    return 0


Job = tuple[Cell, float, int]
Figures = dict[str, Any]


def run_all(jobs: Iterable[Job], folder: Path, work: Callable[[Job, Path], Figures]) -> dict[Job, Figures]:
    """Run the jobs that are not done yet, one process per core; a cell that two arms share runs once."""
    folders = {job: folder / _folder_name(job) for job in jobs}
    # The long ones first, so that no core waits at the end for one that another has just begun.
    todo = {folders[job]: job for job in sorted(folders, key=_price, reverse=True)}
    prices = {path: _price(job) for path, job in todo.items()}
    done = worked(work, todo, max(1, min(len(todo), cores())))
    figures = dict(_progress(done, prices))
    return {job: figures[path] for job, path in folders.items()}


def train_one(job: Job, path: Path) -> Figures:
    """Train, and return the run's final metrics."""
    from conadv_lab.training.loop import train

    cell, lr, seed = job
    folder = train(cell.config(lr, seed), path, resume=True, progress="none")
    return folder.result() or {}


def train_and_measure(job: Job, path: Path) -> Figures:
    """Train, measure the top eigenvalue, store both in the run folder, and return the report's metrics."""
    import torch

    from conadv_lab import sharpness
    from conadv_lab.files import write_json
    from conadv_lab.training.evaluate import fixed_images
    from conadv_lab.training.restore import restore

    _, lr, _ = job
    figures = train_one(job, path)
    measured = path / "sharpness.json"
    if not measured.exists():
        torch.set_num_threads(1)  # the other cores run other jobs
        parts, judged = restore(path)
        facts = {"split": "train", "augmentation": "none", "learning_rate": lr, "weight_decay_inside": False}
        batch = fixed_images(parts.train_set, CURVATURE_IMAGES)
        report = sharpness.measure(
            judged, parts.criterion, [batch], measures=("top_eigenvalue",), facts=facts
        )
        write_json(measured, report.to_dict())
    (top,) = json.loads(measured.read_text())["measures"]
    return figures | {"top_eigenvalue": top["value"], "lr_times_eigenvalue": lr * top["value"]}


def grid() -> list[dict[str, Any]]:
    """The tuning runs: mean test accuracy of every cell at every learning rate."""
    import csv

    with (files("conadv_lab") / GRID_FILE).open() as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "method": row["method"],
            "arm": row["arm"],
            "global_batch": int(row["global_batch"]),
            "lr": float(row["lr"]),
            "test_accuracy": float(row["test_accuracy"]),
        }
        for row in rows
    ]


def best_learning_rates() -> dict[tuple[str, str, int], float]:
    """For every cell, the learning rate with the highest mean accuracy in the grid; the smaller one of ties."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in sorted(grid(), key=lambda row: row["lr"]):
        key = row["method"], row["arm"], row["global_batch"]
        if key not in best or row["test_accuracy"] > best[key]["test_accuracy"]:
            best[key] = row
    return {key: row["lr"] for key, row in best.items()}


def tune(folder: Path) -> None:
    """Measure the grid with seeds that the demo does not use, and write it to the package."""
    jobs = [(cell, lr, seed) for cell in cells() for lr in LEARNING_RATES for seed in TUNING_SEEDS]
    results = run_all(jobs, folder, train_one)
    lines = ["method,arm,global_batch,lr,seeds,test_accuracy"]
    for cell in cells():
        for lr in LEARNING_RATES:
            found = [results[cell, lr, seed]["test_accuracy"] for seed in TUNING_SEEDS]
            lines.append(
                f"{cell.method},{cell.arm},{cell.global_batch},{lr},{len(found)},{sum(found) / len(found):.3f}"
            )
    Path(str(files("conadv_lab") / GRID_FILE)).write_text("\n".join(lines) + "\n")


def _row(cell: Cell, lr: float, figures: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": cell.method,
        "arm": cell.arm,
        "global_batch": cell.global_batch,
        "epochs": round(figures[0]["epochs_seen"], 3),
        "steps": cell.steps,
        "lr": lr,
        "seeds": len(figures),
    }
    for name in ("test_accuracy", "train_test_gap", "top_eigenvalue", "lr_times_eigenvalue"):
        row[name] = _mean_std([figure[name] for figure in figures])
    return row | {"gradient_evaluations": figures[0]["gradient_evaluations"]}


def _mean_std(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {"mean": mean, "std": math.sqrt(variance)}


def _steps(epochs: float, batch: int) -> int:
    return round(epochs * 898 / batch)


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.method, cell.arm, cell.global_batch


def _price(job: Job) -> float:
    cell, _, _ = job
    passes = method_of(Config().replace(method=cell.method)).gradient_evaluations
    # Small batches cost more per image, and more per step.
    return cell.steps * (cell.global_batch + 40) * passes


def _folder_name(job: Job) -> str:
    """A name derived from the config, so that a demo with another config never reuses an older run."""
    cell, lr, seed = job
    digest = identity(resolved(cell.config(lr, seed)))[:8]
    return f"{cell.method}-b{cell.global_batch}-{cell.steps}steps-lr{lr:g}-s{seed}-{digest}"


def _progress(
    done: Iterable[tuple[Path, Figures]], prices: dict[Path, float]
) -> Iterator[tuple[Path, Figures]]:
    """One bar with the time left on a terminal and in a notebook; a line every tenth of the runs elsewhere."""
    from tqdm.auto import tqdm

    from conadv_lab.displays import in_notebook
    from conadv_lab.sharpness.measures.progress import duration

    total = sum(prices.values())
    if sys.stderr.isatty() or in_notebook():
        shape = "{desc} {percentage:3.0f}% {bar} {elapsed}, about {remaining} left"
        with tqdm(total=total, desc="training and measuring", bar_format=shape) as bar:
            for path, figures in done:
                bar.update(prices[path])
                yield path, figures
        return
    began, paid = time.monotonic(), 0.0
    for count, (path, figures) in enumerate(done, 1):
        paid += prices[path]
        if count * 10 // len(prices) > (count - 1) * 10 // len(prices):
            left = (time.monotonic() - began) * (total / paid - 1) if count < len(prices) else 0.0
            more = f", about {duration(left)} left" if left else ""
            print(f"{count} of {len(prices)} runs{more}", flush=True)
        yield path, figures


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
