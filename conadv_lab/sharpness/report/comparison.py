"""Compares several runs: each measure against test accuracy and gap, by Kendall's τ over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conadv_lab.sharpness.measures.results import Report

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = ("test_accuracy", "train_test_gap")
TOLD = {
    "method": "method",
    "global_batch": "global batch",
    "run_seed": "seed",
    "learning_rate": "learning rate",
    "test_accuracy": "test accuracy (%)",
    "train_test_gap": "train − test accuracy (points)",
}
"""Rows about a run, above its measures in a comparison."""
RESAMPLES = 1000
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Correlation:
    """Kendall's τ between a measure and an outcome.

    Attributes:
        tau: τ-b over all runs.
        low, high: its 95 % interval, from resampling *seeds*, all runs of a seed together; ``None`` with fewer
            than five seeds, which are too few to resample.
        luck: the permutation p-value: the fraction of random reorderings of the outcome with at least this |τ|; within
            seeds if every seed has several runs, since runs of one seed are not independent.
        runs, seeds: how many of each.
    """

    measure: str
    outcome: str
    tau: float
    low: float | None
    high: float | None
    runs: int
    seeds: int
    luck: float


def scalars(report: Report) -> dict[str, float]:
    """A report's scalar numbers, those over radii keyed by name and radius; without lists, layers and curves.

    >>> from conadv_lab.sharpness.measures.results import Measure
    >>> scalars(Report((Measure("sam_worst", {0.1: 2.0}, None, 0, 0.0), Measure("trace", 3.0, 0.0, 0, 0.0))))
    {'sam_worst ρ=0.1': 2.0, 'trace': 3.0}
    """
    found: dict[str, float] = {}
    for measure in report.measures:
        sign = "ε" if measure.name.startswith("keskar") else "ρ"
        for part, value, _ in measure.parts():
            if part is None:
                found[measure.name] = float(value)
            elif isinstance(measure.value, Mapping) and isinstance(part, float):
                found[f"{measure.name} {sign}={part:g}"] = float(value)
    return found


def compare(reports: "Mapping[str, Report] | Sequence[tuple[str, Report]]") -> "pd.DataFrame":
    """Measures × runs: one column per run, with its method, batch and accuracy, then all numbers of its report.

    Args:
        reports: by column name.

    >>> from conadv_lab.sharpness.measures.results import Measure
    >>> def of(method, value):
    ...     return Report((Measure("trace", value, 0.1, 0, 0.0, {"method": method, "test_accuracy": 97.5}),))
    >>> print(compare({"a": of("vanilla", 3.0), "b": of("conadv", 2.0)}))
                             a       b
    method             vanilla  conadv
    test accuracy (%)     97.5    97.5
    trace                  3.0     2.0
    """
    import pandas as pd

    pairs = list(reports.items() if isinstance(reports, Mapping) else reports)
    columns = {}
    for name, report in pairs:
        facts = report.measures[0].conditions if report.measures else {}
        told = {label: facts[key] for key, label in TOLD.items() if facts.get(key) is not None}
        columns[name] = pd.Series(told | scalars(report), dtype=object)
    return pd.DataFrame(
        columns, index=list(dict.fromkeys(key for column in columns.values() for key in column.index))
    )


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's τ-b (Kendall 1945), which handles ties; NaN if one side is all ties.

    Many times faster than SciPy's for a comparison's few dozen runs, which are resampled thousands of times.

    >>> round(kendall_tau(np.array([1, 2, 3, 3]), np.array([2, 4, 6, 9])), 4)
    0.9129
    """
    a, b = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    scale = float((a * a).sum()) * float((b * b).sum())
    return float((a * b).sum()) / math.sqrt(scale) if scale else math.nan


def correlations(reports: Sequence[Report], seed: int = 0) -> list[Correlation]:
    """τ between every number that all reports have and every outcome that all runs state.

    Runs of one seed share data order and initial weights, so they are not independent: the interval resamples seeds
    with all their runs; fewer than five seeds give no interval, fewer than three runs no τ.
    """
    numbers = [scalars(report) for report in reports]
    facts = [report.measures[0].conditions for report in reports if report.measures]
    if len(facts) < 3 or len(facts) != len(reports):
        return []
    seeds = np.array([str(f.get("run_seed", index)) for index, f in enumerate(facts)])
    shared = [name for name in numbers[0] if all(name in other for other in numbers)]
    result = []
    for outcome in OUTCOMES:
        if not all(outcome in f for f in facts):
            continue
        y = np.array([float(f[outcome]) for f in facts])
        for name in shared:
            x = np.array([n[name] for n in numbers])
            tau = kendall_tau(x, y)
            if not math.isnan(tau):
                low, high = _interval(x, y, seeds, seed)
                result.append(
                    Correlation(
                        name, outcome, tau, low, high, len(y), len(set(seeds)), _luck(tau, x, y, seeds, seed)
                    )
                )
    return result


def _interval(
    x: np.ndarray, y: np.ndarray, seeds: np.ndarray, seed: int
) -> tuple[float | None, float | None]:
    kinds = np.unique(seeds)
    if len(kinds) < FEWEST_SEEDS:
        return None, None
    rng = np.random.default_rng(seed)
    where = {kind: np.flatnonzero(seeds == kind) for kind in kinds}
    taus = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([where[kind] for kind in rng.choice(kinds, len(kinds))])
        taus.append(kendall_tau(x[rows], y[rows]))
    low, high = np.nanquantile(taus, [0.025, 0.975])
    return float(low), float(high)


def _luck(tau: float, x: np.ndarray, y: np.ndarray, seeds: np.ndarray, seed: int) -> float:
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(seeds == kind) for kind in np.unique(seeds)]
    if min(map(len, groups)) < 2:
        groups = [np.arange(len(y))]
    as_large = 0
    for _ in range(RESAMPLES):
        mixed = y.copy()
        for group in groups:
            mixed[group] = y[rng.permutation(group)]
        as_large += abs(kendall_tau(x, mixed)) >= abs(tau) - 1e-12
    return (as_large + 1) / (RESAMPLES + 1)
