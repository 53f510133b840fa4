"""Figures, one function each: a tidy frame and an axis in, the axis out.

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers differ too, for print.
"""

from typing import TYPE_CHECKING

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


def figure_against_batch(
    rows: "pd.DataFrame", figure: str, label: str, *, log: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """One figure of each method against the global batch: means, and standard deviations over seeds as bars.

    Args:
        rows: columns ``method``, ``global_batch``, ``FIGURE_mean``, ``FIGURE_std``, ``seeds``.
        figure: which figure; label: its name and unit on the axis; log: logarithmic axis.
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
            own[f"{figure}_std"],
            color=colour,
            marker=marker,
            markersize=6,
            capsize=2.5,
            linestyle="none",
            linewidth=1.2,
            label=method,
        )
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.set_xlabel(
        f"global batch (images); n = {int(rows['seeds'].min())} seeds, bars ± 1 standard deviation"
    )
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
