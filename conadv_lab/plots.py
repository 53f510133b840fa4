"""Figures, one function each: takes a tidy frame and an axis, returns the axis.

Colours are Okabe and Ito's for methods and seaborn's "colorblind" for all else, both safe for colour-blind readers;
markers differ too, for print.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conadv_lab.config import Config
from conadv_lab.intervals import RECORDED, t_interval
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.base import Method

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BARS = {"std": "± 1 standard deviation", "interval": "95 % t intervals"}


def look_of(method: str, rows: "pd.DataFrame | None" = None) -> dict[str, Any]:
    """Label, colour and marker of a method for matplotlib; a user-defined method takes them from its rows.

    >>> look_of("recycled-equal")
    {'label': 'recycled-equal', 'color': '#009E73', 'marker': 'P', 'fillstyle': 'none'}
    """
    if method in METHODS:
        kind = method_of(Config().replace(method=method))
        found, filled = {name: getattr(kind, name) for name in RECORDED}, not kind.together
    else:
        found, filled = {"label": method.rpartition(":")[2]}, True
        found |= {name: getattr(Method, name) for name in ("colour", "marker")}
        if rows is not None and "method_label" in rows:
            own = rows[rows["method"] == method].iloc[0]
            found = {name: own[f"method_{name}"] for name in RECORDED}
    fill = "full" if filled else "none"
    return {"label": found["label"], "color": found["colour"], "marker": found["marker"], "fillstyle": fill}


def figure_against_batch(
    rows: "pd.DataFrame",
    figure: str,
    label: str,
    *,
    log: bool = False,
    spread: str = "std",
    ax: "Axes | None" = None,
) -> "Axes":
    """One metric of each method against the global batch: means, with error bars over seeds.

    Equal-cost forms have their paired form's marker, unfilled.

    Args:
        rows: columns ``method``, ``global_batch``, ``FIGURE_mean``, ``seeds``, and ``FIGURE_std``, or ``FIGURE_low``
            and ``FIGURE_high``.
        figure: the metric; label: its name and unit on the axis; log: logarithmic axis.
        spread: ``"std"``, or ``"interval"`` as `conadv_lab.intervals.over_seeds` makes it.
    """
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    batches = sorted(rows["global_batch"].unique())
    methods = [name for name in METHODS if name in set(rows["method"])]
    methods += sorted(set(rows["method"]) - set(methods))
    for i, method in enumerate(methods):
        own = rows[rows["method"] == method].sort_values("global_batch")
        # Batches are categories, and methods are placed side by side, so that error bars do not overlap.
        shift = (i - (len(methods) - 1) / 2) * 0.75 / max(len(methods), 1)
        places = [batches.index(batch) + shift for batch in own["global_batch"]]
        axes.errorbar(
            places,
            own[f"{figure}_mean"],
            _bars(own, figure, spread),
            markersize=6,
            capsize=2.5,
            linestyle="none",
            linewidth=1.2,
            **look_of(method, rows),
        )
    axes.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.set_xlabel(f"global batch (images)\nn = {_seeds(rows)} seeds, bars {BARS[spread]}")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    return _plain(axes)


def _seeds(rows: "pd.DataFrame") -> str:
    """How many seeds the points have: one number, or one per batch, or the range."""
    by_batch = rows.groupby("global_batch")["seeds"].agg(["min", "max"]).astype(int)
    if (by_batch["min"] != by_batch["max"]).any():
        return f"{by_batch['min'].min()}–{by_batch['max'].max()}"
    counts = by_batch["min"].tolist()
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def _bars(own: "pd.DataFrame", figure: str, spread: str) -> Any:
    middle = own[f"{figure}_mean"]
    if spread == "interval":
        return [middle - own[f"{figure}_low"], own[f"{figure}_high"] - middle]
    return own[f"{figure}_std"]


def differences(
    estimates: Mapping[str, Any],
    label: str,
    *,
    neutral: float = 0.0,
    log: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Differences or ratios as a column of points with intervals, and a line at no difference.

    Args:
        estimates: by name, topmost first: objects with ``value``, ``low``, ``high`` and ``n``.
        label: axis label, with unit; neutral: where the line is, 0 or, for ratios, 1.
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
    axes.set_xlabel(f"{label}\n95 % t intervals; filled: interval excludes {neutral:g}")
    if log:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
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
    """Means of ``y`` over runs at each value of a categorical ``x``, joined by lines, with 95 % t intervals.

    Args:
        rows: one row per run; hue: a column whose values get their own colours and markers.
        log: logarithmic axis, geometric means and intervals of the logarithms.
        more: for ``seaborn.pointplot``.
    """
    import seaborn
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    look: dict[str, Any] = {"markers": "o"}
    if hue is not None:
        looks = _looks(rows[hue])
        look = {
            "hue_order": list(looks),
            "palette": {kind: own["color"] for kind, own in looks.items()},
            "markers": [own["marker"] for own in looks.values()],
            "linestyles": [own["linestyle"] for own in looks.values()],
            "dodge": 0.12 * (len(looks) - 1),
        }
    seaborn.pointplot(
        rows, x=x, y=y, hue=hue, errorbar=t_interval, capsize=0.08, linewidth=1.2, markersize=5,
        ax=axes, log_scale=log or None, **look, **more,
    )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        _plain_ticks(axes.yaxis)
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
    """Lines over a numerical axis, one per ``hue``; several runs at one ``x`` give 95 % t intervals."""
    import seaborn
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    looks = _looks(rows[hue])
    seaborn.lineplot(
        rows.reset_index(drop=True), x=x, y=y, hue=hue, style=hue, hue_order=list(looks), style_order=list(looks),
        palette={kind: own["color"] for kind, own in looks.items()},
        markers={kind: own["marker"] for kind, own in looks.items()},
        dashes={kind: "" if own["linestyle"] == "-" else (3, 2) for kind, own in looks.items()},
        linewidth=1.2, errorbar=t_interval, err_style="bars", err_kws={"capsize": 2.5}, ax=axes, **more,
    )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if logx:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        places = sorted(rows[x].unique())
        if len(places) <= 8:
            axes.set_xticks(places)
    if logy:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    return _plain(axes)


def _looks(values: "pd.Series") -> dict[Any, dict[str, str]]:
    """Colour, marker and line of each value, in their order of appearance; methods keep those of all figures.

    >>> import pandas as pd
    >>> {name: look["marker"] for name, look in _looks(pd.Series(["conadv", "vanilla"])).items()}
    {'conadv': 'v', 'vanilla': 'o'}
    """
    import seaborn

    kinds = list(dict.fromkeys(values))
    if all(kind in METHODS for kind in kinds):
        found = {kind: look_of(kind) for kind in kinds}
        return {
            kind: {
                "color": look["color"],
                "marker": look["marker"],
                "linestyle": "--" if look["fillstyle"] == "none" else "-",
            }
            for kind, look in found.items()
        }
    colours = seaborn.color_palette("colorblind", len(kinds)).as_hex()
    return {
        kind: {"color": colours[place], "marker": MARKERS[place % len(MARKERS)], "linestyle": "-"}
        for place, kind in enumerate(kinds)
    }


def _plain_ticks(axis: Any) -> None:
    """Tick labels 1.5, 2, 3 instead of powers of ten if the axis spans about a decade or less."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 500 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _plain(axes: "Axes", grid: Any = "y") -> "Axes":
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def growth(rows: "pd.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """AutoWU's learning rate and the clean loss against the step, with the outcome of each test of the loss.

    Args:
        rows: metrics of one run, from `conadv_lab.frames.frame_of_metrics`.
        ax: where to draw; None: the current axis.

    Raises:
        ValueError: the run's schedule is not autowu.
    """
    from matplotlib import pyplot as plt

    if "autowu_probability" not in rows:
        raise ValueError("no row has autowu_probability; allowed: metrics of a run with --schedule autowu")
    axes = ax if ax is not None else plt.gca()
    other = axes.twinx()
    (loss,) = other.plot(rows["step"], rows["loss"], color="#999999", linewidth=1, label="clean loss")
    other.set_ylabel("clean loss")
    (rate,) = axes.plot(rows["step"], rows["lr"], color="#0072B2", label="learning rate")
    tests = rows[rows["autowu_probability"].notna()]
    high = tests["autowu_positives"] > 0
    look: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "#0072B2"}
    (no,) = axes.plot(
        tests["step"][~high], tests["lr"][~high], label="test: not turned", fillstyle="none", **look
    )
    look |= {"color": "#D55E00"}
    (yes,) = axes.plot(tests["step"][high], tests["lr"][high], label="test: the loss has turned", **look)
    last = tests.iloc[-1]
    title = last.get("autowu_reason")
    axes.set_title(
        f"growth ended after step {last['step']:.0f}: {title}" if isinstance(title, str) else "growing"
    )
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.legend(handles=[rate, yes, no, loss], frameon=False, fontsize="small")
    return axes
