"""Figures, one function each: a tidy frame and an axis in, the axis out.

Colours are Okabe and Ito's, or seaborn's "colorblind" where methods are not what differs: the colour-blind can tell
both apart; markers differ too, for print.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

METHOD_STYLE = {
    "vanilla": ("#000000", "o"),
    "copy": ("#999999", "s"),
    "noise": ("#E69F00", "^"),
    "disadv": ("#0072B2", "D"),
    "conadv": ("#D55E00", "v"),
    "recycled": ("#009E73", "P"),
    "copy-equal": ("#999999", "s"),
    "noise-equal": ("#E69F00", "^"),
    "recycled-equal": ("#009E73", "P"),
}


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BARS = {"std": "± 1 standard deviation", "interval": "95 % t intervals"}


def t_interval(values: "Sequence[float] | pd.Series", confidence: float = 0.95) -> tuple[float, float]:
    """Ends of Student's interval of a mean; NaN for fewer than two values.

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
    rows: "pd.DataFrame", figure: str, by: Sequence[str] = ("method", "global_batch")
) -> "pd.DataFrame":
    """One row a cell from one row a run: ``FIGURE_mean``, ``FIGURE_interval`` (half its width) and ``seeds``."""

    def half(values: "pd.Series") -> float:
        low, high = t_interval(values)
        return (high - low) / 2

    columns = {
        f"{figure}_mean": (figure, "mean"),
        f"{figure}_interval": (figure, half),
        "seeds": (figure, "size"),
    }
    return rows.groupby(list(by), as_index=False).agg(**columns)


def figure_against_batch(
    rows: "pd.DataFrame",
    figure: str,
    label: str,
    *,
    log: bool = False,
    spread: str = "std",
    ax: "Axes | None" = None,
) -> "Axes":
    """One figure of each method against the global batch: means, and their spread over seeds as bars.

    Equal-cost forms have the marker of their paired form, left open.

    Args:
        rows: columns ``method``, ``global_batch``, ``FIGURE_mean``, ``FIGURE_SPREAD``, ``seeds``.
        figure: which figure; label: its name and unit on the axis; log: logarithmic axis.
        spread: ``"std"``, or ``"interval"`` as `over_seeds` makes it.
    """
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    batches = sorted(rows["global_batch"].unique())
    methods = [name for name in METHOD_STYLE if name in set(rows["method"])]
    methods += sorted(set(rows["method"]) - set(methods))
    for i, method in enumerate(methods):
        own = rows[rows["method"] == method].sort_values("global_batch")
        colour, marker = METHOD_STYLE.get(method, ("#CC79A7", "X"))
        # Batches are places on the axis, and methods stand beside one another, so that bars do not overlap.
        shift = (i - (len(methods) - 1) / 2) * 0.6 / max(len(methods), 1)
        places = [batches.index(batch) + shift for batch in own["global_batch"]]
        axes.errorbar(
            places,
            own[f"{figure}_mean"],
            own[f"{figure}_{spread}"],
            color=colour,
            marker=marker,
            markersize=6,
            fillstyle="none" if method.endswith("-equal") else "full",
            capsize=2.5,
            linestyle="none",
            linewidth=1.2,
            label=method,
        )
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    fewest, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    seeds = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    axes.set_xlabel(f"global batch (images); n = {seeds} seeds, bars {BARS[spread]}")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    return _plain(axes)


def differences(
    estimates: Mapping[str, Any],
    label: str,
    *,
    neutral: float = 0.0,
    log: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Differences or ratios as points with intervals, one below the other, and a line where nothing differs.

    Args:
        estimates: by name, the uppermost first: objects with ``value``, ``low``, ``high`` and ``n``.
        label: what they are, with unit, on the axis; neutral: where the line stands, 0 or for ratios 1.
    """
    import seaborn
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    clear, unclear = seaborn.color_palette("colorblind")[0], "#777777"
    for place, found in enumerate(estimates.values()):
        stands_out = found.low > neutral or found.high < neutral
        axes.errorbar(
            found.value,
            place,
            xerr=[[found.value - found.low], [found.high - found.value]],
            color=clear if stands_out else unclear,
            marker="o" if stands_out else "s",
            fillstyle="full" if stands_out else "none",
            capsize=2.5,
            linewidth=1.2,
        )
    axes.axvline(neutral, color="black", linewidth=0.8)
    axes.set_yticks(range(len(estimates)), [f"{name}  (n = {found.n})" for name, found in estimates.items()])
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
    return _plain(axes, "x")


def points(
    rows: "pd.DataFrame",
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    *,
    hue: str | None = None,
    log: bool = False,
    ax: "Axes | None" = None,
    **more: Any,
) -> "Axes":
    """Means of ``y`` over runs at each value of ``x``, as a row of places, joined by lines, with 95 % t intervals.

    Args:
        rows: one row a run; hue: a column whose values get colours and markers of their own.
        more: for ``seaborn.pointplot``.
    """
    import seaborn
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    kinds = 1 if hue is None else rows[hue].nunique()
    look: dict[str, Any] = {"dodge": 0.12 * (kinds - 1), "palette": "colorblind"} if hue else {}
    seaborn.pointplot(
        rows, x=x, y=y, hue=hue, errorbar=t_interval, capsize=0.08, linewidth=1.2, markersize=5,
        markers=list(MARKERS[:kinds]), ax=axes, **look, **more,
    )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    return _plain(axes)


def curves(
    rows: "pd.DataFrame",
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    *,
    hue: str,
    logx: bool = False,
    logy: bool = False,
    ax: "Axes | None" = None,
    **more: Any,
) -> "Axes":
    """Lines over a numerical axis, one for each ``hue``; several runs at a place give 95 % t intervals."""
    import seaborn
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    kinds = rows[hue].nunique()
    seaborn.lineplot(
        rows, x=x, y=y, hue=hue, style=hue, markers=list(MARKERS[:kinds]), dashes=False, linewidth=1.2,
        palette=seaborn.color_palette("colorblind", kinds), errorbar=t_interval, err_style="bars",
        err_kws={"capsize": 2.5}, ax=axes, **more,
    )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")
    return _plain(axes)


def _plain(axes: "Axes", grid: Any = "y") -> "Axes":
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
