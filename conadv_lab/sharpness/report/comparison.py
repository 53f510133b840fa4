"""Several runs side by side: each measure against test accuracy and gap, by Kendall's τ over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conadv_lab.sharpness.measures.results import Report

OUTCOMES = ("test_accuracy", "train_test_gap")
RESAMPLES = 1000
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Correlation:
    """Kendall's τ between a measure and an outcome.

    Attributes:
        tau: τ-b over all runs.
        low, high: its 95 % interval, from resampling *seeds*, all of a seed's runs together; ``None`` with fewer
            than five seeds, of which a resampling says too little.
        luck: the share of random reorderings of the outcome with at least this |τ|; within seeds, where every
            seed has several runs, since runs of one seed are not independent.
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
    """A report's numbers, one each: those that are lists by their first, those over ρ by name and ρ.

    >>> from conadv_lab.sharpness.measures.results import Measure
    >>> scalars(Report((Measure("sam_worst", {"0.1": 2.0}, None, 0, 0.0), Measure("trace", 3.0, 0.0, 0, 0.0))))
    {'sam_worst ρ=0.1': 2.0, 'trace': 3.0}
    """
    found: dict[str, float] = {}
    for measure in report.measures:
        value: Any = measure.value
        if isinstance(value, (int, float)):
            found[measure.name] = float(value)
        elif (
            isinstance(value, dict) and value and all(map(_is_number, value)) and "layer" not in measure.name
        ):
            sign = "ε" if measure.name.startswith("keskar") else "ρ"
            found |= {f"{measure.name} {sign}={radius}": float(v) for radius, v in value.items()}
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's τ-b (Kendall 1945), which counts ties rightly; NaN where one side is all ties.

    Many times faster than SciPy's for the few dozen runs of a comparison, of which thousands are resampled.

    >>> round(kendall_tau(np.array([1, 2, 3, 3]), np.array([2, 4, 6, 9])), 4)
    0.9129
    """
    a, b = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    scale = float((a * a).sum()) * float((b * b).sum())
    return float((a * b).sum()) / math.sqrt(scale) if scale else math.nan


def correlations(reports: Sequence[Report], seed: int = 0) -> list[Correlation]:
    """τ of every number that all reports have with every outcome that all runs state.

    Runs of one seed share data order and start, so they are not independent: the interval resamples seeds and
    takes all runs of each; fewer than five seeds give no interval, fewer than three runs no τ.
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
