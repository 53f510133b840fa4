"""Means and differences over seeds, with their intervals.

All intervals are Student's t at 95 %, over seeds. Cells are compared seed by seed: a seed gives both the same
initial weights and, at the same batch, the same order of images, so much of the spread cancels. Nothing is adjusted for
the number of comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conadv_lab.intervals import t_interval
from conadv_lab.mistakes import require

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its interval; ``low`` and ``high`` are NaN for a single seed.

    Attributes:
        kind: ``"mean"``, ``"difference"`` or ``"ratio"``, which decides how it is written.
    """

    value: float
    low: float
    high: float
    n: int
    kind: str = "mean"
    decimals: int = 2

    def __str__(self) -> str:
        d = self.decimals
        if self.kind == "mean":
            half = "" if math.isnan(self.low) else f" ± {(self.high - self.low) / 2:.{d}f}"
            return f"{self.value:.{d}f}{half}"
        sign = "+" if self.kind == "difference" else ""
        ends = f" ({self.low:{sign}.{d}f} to {self.high:{sign}.{d}f})" if self.n > 1 else ""
        return f"{self.value:{sign}.{d}f}{ends}".replace("-", "−")

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above nothing: above 0, or for a ratio above 1."""
        return self.low > (1 if self.kind == "ratio" else 0)

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0, or for a ratio below 1."""
        return self.high < (1 if self.kind == "ratio" else 0)

    @property
    def open(self) -> bool:
        """Whether the interval holds 0, or for a ratio 1: no difference was found."""
        return not self.above and not self.below


def mean(values: Sequence[float], kind: str = "mean", decimals: int = 2) -> Estimate:
    """Mean and t interval of independent values.

    >>> str(mean([1.0, 2.0, 3.0]))
    '2.00 ± 2.48'
    """
    count = len(values)
    require(count > 0, "values", values, "at least one")
    middle = sum(values) / count
    return Estimate(middle, *t_interval(values, CONFIDENCE), count, kind, decimals)


def rows_of(rows: "pd.DataFrame", **wanted: Any) -> "pd.DataFrame":
    """The rows whose columns have these values.

    Raises:
        ValueError: there is none.
    """
    chosen = rows
    for column, value in wanted.items():
        chosen = chosen[chosen[column] == value]
    if chosen.empty:
        raise ValueError(f"no row has {wanted}; the table was measured at another scale")
    return chosen


def difference(
    rows: "pd.DataFrame", one: Mapping[str, Any], other: Mapping[str, Any], figure: str, decimals: int = 2
) -> Estimate:
    """Mean over shared seeds of one's value − other's value in a column, seed by seed."""
    pairs = _pairs(rows, one, other, figure)
    return mean([a - b for a, b in pairs], "difference", decimals)


def ratio(
    rows: "pd.DataFrame", one: Mapping[str, Any], other: Mapping[str, Any], figure: str, decimals: int = 2
) -> Estimate:
    """Geometric mean over shared seeds of one's value / other's value, for columns that span decades."""
    logs = mean([math.log(a / b) for a, b in _pairs(rows, one, other, figure)])
    value, low, high = (math.exp(part) for part in (logs.value, logs.low, logs.high))
    return Estimate(value, low, high, logs.n, "ratio", decimals)


def cell_mean(rows: "pd.DataFrame", cell: Mapping[str, Any], figure: str, decimals: int = 2) -> Estimate:
    """Mean of a column over the seeds of one cell."""
    return mean(rows_of(rows, **cell)[figure].tolist(), decimals=decimals)


def _pairs(
    rows: "pd.DataFrame", one: Mapping[str, Any], other: Mapping[str, Any], figure: str
) -> list[tuple[float, float]]:
    first = rows_of(rows, **one).set_index("seed")[figure]
    second = rows_of(rows, **other).set_index("seed")[figure]
    seeds = first.index.intersection(second.index)
    require(len(seeds) > 0, "seeds", list(seeds), f"at least one that {one} and {other} share")
    return [(float(first[seed]), float(second[seed])) for seed in seeds]
