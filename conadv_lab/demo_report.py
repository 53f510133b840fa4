"""The demo's table and its page: one self-contained HTML file that opens offline, in both colour schemes."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from conadv_lab.pages import neutral, render, svg, write
from conadv_lab.plots import figure_against_batch

ARMS = {
    "equal-epochs": "Equal epochs: what does a method do at a given number of passes over the data?",
    "equal-steps": "Equal steps at equal cost: of a batch half is new and half altered, a vanilla step's price",
    "equal-arithmetic": "Equal arithmetic: vanilla with the 2.67-fold steps that ConAdv's attack would pay for",
}
FIGURES = (
    ("test_accuracy", "test accuracy (%)", False),
    ("train_test_gap", "train − test accuracy (points)", False),
    ("top_eigenvalue", "top Hessian eigenvalue λ", True),
    ("lr_times_eigenvalue", "lr · λ", True),
)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The summary's rows with a column for every mean and every standard deviation."""
    flat = []
    for row in rows:
        plain = {k: v for k, v in row.items() if not isinstance(v, dict)}
        spread = {f"{k}_{part}": v[part] for k, v in row.items() if isinstance(v, dict) for part in v}
        flat.append(plain | spread)
    return pd.DataFrame(flat)


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows, arm by arm, on the terminal."""
    head = f"{'method':15} {'batch':>5} {'epochs':>6} {'steps':>5} {'lr':>5} {'cost':>5}"
    head += f" {'test acc. %':>15} {'gap':>6} {'top eigenvalue':>16} {'lr*eig':>7}"
    for arm, rows_of_arm in _by_arm(rows):
        print(f"\n{ARMS[arm]}\n{head}")
        for row in rows_of_arm:
            accuracy, top = row["test_accuracy"], row["top_eigenvalue"]
            print(
                f"{row['method']:15} {row['global_batch']:5} {row['epochs']:6.1f} {row['steps']:5} {row['lr']:5.2f}"
                f" {row['gradient_evaluations']:5.2f} {accuracy['mean']:7.2f} ± {accuracy['std']:5.2f}"
                f" {row['train_test_gap']['mean']:6.2f} {top['mean']:8.2f} ± {top['std']:5.2f}"
                f" {row['lr_times_eigenvalue']['mean']:7.2f}"
            )


def write_report(path: Path, summary: dict[str, Any], grid: list[dict[str, Any]]) -> None:
    """Write the page; a reader never sees half of it."""
    rows = summary["rows"]
    page = render(
        "demo_report.html",
        arms=[{"name": arm, "title": ARMS[arm], "rows": own} for arm, own in _by_arm(rows)],
        findings=findings(rows),
        pictures=list(_pictures(frame(rows))),
        grid=_grid_table(grid),
        seconds=summary["seconds"],
        seeds=rows[0]["seeds"],
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    write(path, page)


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Differences that the rows hold, each with its standard error, and a word on whether it stands out of it."""
    largest = max(row["global_batch"] for row in rows)
    sentences = []
    for batch in sorted({row["global_batch"] for row in rows}):
        for method, rival, arm in (
            ("conadv", "vanilla", "equal-epochs"),
            ("recycled-equal", "vanilla", "equal-steps"),
            ("recycled-equal", "copy-equal", "equal-steps"),
        ):
            sentences.append(_difference(rows, batch, (method, arm), (rival, arm)))
    pair = (("conadv", "equal-epochs"), ("vanilla", "equal-arithmetic"))
    return [*sentences, _difference(rows, largest, *pair)]


def _difference(rows: list[dict[str, Any]], batch: int, one: tuple[str, str], other: tuple[str, str]) -> str:
    def find(method: str, arm: str) -> dict[str, Any]:
        return next(r for r in rows if (r["method"], r["arm"], r["global_batch"]) == (method, arm, batch))

    a, b = find(*one), find(*other)
    means = a["test_accuracy"]["mean"] - b["test_accuracy"]["mean"]
    error = math.sqrt((a["test_accuracy"]["std"] ** 2 + b["test_accuracy"]["std"] ** 2) / a["seeds"])
    clear = (
        "more than twice its standard error" if abs(means) > 2 * error else "within twice its standard error"
    )
    flat = a["top_eigenvalue"]["mean"] / max(b["top_eigenvalue"]["mean"], 1e-12)
    arithmetic = " at equal arithmetic" if other[1] == "equal-arithmetic" else ""
    return (
        f"Batch {batch}: {one[0]} against {other[0]}{arithmetic}, {means:+.2f} points of test accuracy "
        f"(standard error {error:.2f}; {clear}); top eigenvalue {flat:.2f} times as large, "
        f"at learning rates {a['lr']:g} and {b['lr']:g}."
    )


def _by_arm(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for arm in ARMS:
        yield arm, [row for row in rows if row["arm"] == arm]


def _pictures(rows: pd.DataFrame) -> Iterator[dict[str, str]]:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for arm in ("equal-epochs", "equal-steps"):
        figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.6), layout="constrained")
        own = rows[rows["arm"] == arm]
        for ax, (name, label, log) in zip(axes.flat, FIGURES, strict=True):
            figure_against_batch(own, name, label, log=log, ax=ax)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
        yield {"title": ARMS[arm], "svg": svg(neutral(figure))}
        plt.close(figure)


def _grid_table(grid: list[dict[str, Any]]) -> dict[str, Any]:
    rates = sorted({row["lr"] for row in grid})
    lines: dict[tuple[str, str, int], dict[float, float]] = {}
    for row in grid:
        lines.setdefault((row["arm"], row["method"], row["global_batch"]), {})[row["lr"]] = row[
            "test_accuracy"
        ]
    return {
        "rates": rates,
        "lines": [
            {"cell": cell, "values": [found.get(rate) for rate in rates], "best": max(found.values())}
            for cell, found in lines.items()
        ],
    }
