"""Means over seeds with Student's t intervals."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

RECORDED = ("label", "colour", "marker")
"""How a method looks in figures; runs record these as ``method_label`` and so on, for user-defined methods."""


def t_interval(values: "Sequence[float] | pd.Series", confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean, as (low, high); NaN for fewer than two values.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    from scipy import stats

    count = len(values)
    if count < 2:
        return math.nan, math.nan
    middle = sum(values) / count
    error = math.sqrt(sum((value - middle) ** 2 for value in values) / (count - 1) / count)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return middle - half, middle + half


def over_seeds(
    rows: "pd.DataFrame", figure: str, by: Sequence[str] = ("method", "global_batch"), *, log: bool = False
) -> "pd.DataFrame":
    """One row per cell from one row per run: ``METRIC_mean``, ``METRIC_low``, ``METRIC_high`` (t interval), ``seeds``.

    Args:
        log: geometric means and intervals of the logarithms, for metrics that span decades.
    """
    import numpy as np

    def interval(values: "pd.Series") -> tuple[float, float, float]:
        found = (
            (values.mean(), *t_interval(values))
            if not log
            else (np.log(values).mean(), *t_interval(np.log(values)))
        )
        return tuple(np.exp(found)) if log else found

    grouped = rows.groupby(list(by))[figure]
    parts = grouped.agg(interval)
    cells = parts.index.to_frame(index=False)
    for place, end in enumerate(("mean", "low", "high")):
        cells[f"{figure}_{end}"] = [part[place] for part in parts]
    for name in (f"method_{part}" for part in RECORDED if f"method_{part}" in rows):
        cells[name] = rows.groupby(list(by))[name].first().to_numpy()
    return cells.assign(seeds=grouped.size().to_numpy())
