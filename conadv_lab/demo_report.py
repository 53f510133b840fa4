"""The demo's table and report: one self-contained HTML file that works offline, in light and dark mode."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from conadv_lab.pages import neutral, render, svg, write
from conadv_lab.plots import figure_against_batch

ARMS = {
    "equal-epochs": "Equal epochs: every method trains for the same number of epochs",
    "equal-steps": "Equal steps at equal cost: half of each batch is new, half altered, at the cost of a vanilla step",
    "equal-arithmetic": "Equal arithmetic: vanilla with 2.67 times the steps, at the same total cost as ConAdv",
}
FIGURES = (
    ("test_accuracy", "test accuracy (%)", False),
    ("train_test_gap", "train − test accuracy (points)", False),
    ("top_eigenvalue", "top Hessian eigenvalue λ", True),
    ("lr_times_eigenvalue", "learning rate · λ", True),
)
PAIRS = (
    (("conadv", "equal-epochs"), ("vanilla", "equal-epochs")),
    (("conadv", "equal-epochs"), ("copy", "equal-epochs")),
    (("recycled-equal", "equal-steps"), ("vanilla", "equal-steps")),
    (("recycled-equal", "equal-steps"), ("copy-equal", "equal-steps")),
)
AT_EQUAL_ARITHMETIC = (("conadv", "equal-epochs"), ("vanilla", "equal-arithmetic"))
"""Each (method, arm) and those it is compared with."""


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The summary's rows, with a column for each mean and standard deviation."""
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
    """Write the page atomically."""
    rows = summary["rows"]
    flat = frame(rows)
    page = render(
        "demo_report.html",
        lead=lead(rows),
        first=_picture(flat, "equal-epochs", *FIGURES[0], size=(5.6, 3.9)),
        differences=differences(rows),
        pictures=[
            {
                "title": ARMS[arm],
                "svgs": [_picture(flat, arm, *figure) for figure in FIGURES[arm == "equal-epochs" :]],
            }
            for arm in ("equal-epochs", "equal-steps")
        ],
        arms=[{"name": arm, "title": ARMS[arm], "rows": own} for arm, own in _by_arm(rows)],
        grid=_grid_table(grid),
        seconds=summary["seconds"],
        seeds=rows[0]["seeds"],
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    write(path, page)


def lead(rows: list[dict[str, Any]]) -> str:
    """The result in one sentence."""
    batch = max(row["global_batch"] for row in rows)

    def accuracy(method: str, arm: str) -> str:
        return f"{_find(rows, method, arm, batch)['test_accuracy']['mean']:.2f} %"

    return (
        f"With all {batch} training images in one batch, ConAdv reaches {accuracy('conadv', 'equal-epochs')} test "
        f"accuracy and vanilla {accuracy('vanilla', 'equal-epochs')}; vanilla with as much arithmetic as ConAdv "
        f"reaches {accuracy('vanilla', 'equal-arithmetic')}."
    )


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For pairs of methods: difference in test accuracy in points, its standard error, and ratio of eigenvalues."""
    batches = sorted({row["global_batch"] for row in rows})
    pairs = [(batch, *pair) for batch in batches for pair in PAIRS]
    return [_difference(rows, *pair) for pair in [*pairs, (batches[-1], *AT_EQUAL_ARITHMETIC)]]


def _difference(
    rows: list[dict[str, Any]], batch: int, one: tuple[str, str], other: tuple[str, str]
) -> dict[str, Any]:
    a, b = _find(rows, *one, batch), _find(rows, *other, batch)
    spreads = a["test_accuracy"]["std"] ** 2 + b["test_accuracy"]["std"] ** 2
    points, error = a["test_accuracy"]["mean"] - b["test_accuracy"]["mean"], math.sqrt(spreads / a["seeds"])
    return {
        "batch": batch,
        "pair": f"{one[0]} − {other[0]}",
        "arm": other[1].replace("-", " "),
        "points": points,
        "error": error,
        "clear": abs(points) > 2 * error,
        "eigenvalues": a["top_eigenvalue"]["mean"] / max(b["top_eigenvalue"]["mean"], 1e-12),
    }


def _find(rows: list[dict[str, Any]], method: str, arm: str, batch: int) -> dict[str, Any]:
    return next(r for r in rows if (r["method"], r["arm"], r["global_batch"]) == (method, arm, batch))


def _by_arm(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for arm in ARMS:
        yield arm, [row for row in rows if row["arm"] == arm]


def _picture(
    rows: pd.DataFrame, arm: str, name: str, label: str, log: bool, size: tuple[float, float] = (5.2, 3.7)
) -> str:
    """One metric of one arm against batch size, as SVG that is readable on a phone."""
    drawn = Figure(figsize=size, layout="constrained")
    axes = figure_against_batch(rows[rows["arm"] == arm], name, label, log=log, ax=drawn.add_subplot())
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return svg(neutral(drawn))


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
