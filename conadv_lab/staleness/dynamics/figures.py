"""Figures of the dynamics, one function each: takes the tidy frame and an axis, returns the axis.

Colours are Okabe and Ito's, safe for colour-blind readers; markers differ too, for print.
"""

from typing import TYPE_CHECKING

from conadv_lab.mistakes import unknown
from conadv_lab.staleness.dynamics.frame import PHASES, WHOLE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_STYLE = {"warm-up": ("#E69F00", "^"), "early": ("#0072B2", "o"), "late": ("#D55E00", "s")}
LABELS = {
    "test_accuracy": "test accuracy (%)",
    "train_test_gap": "training minus test accuracy (points)",
    "top_eigenvalue": "top Hessian eigenvalue λ",
    "lr_times_eigenvalue": "peak learning rate × λ",
    "squared_gradient": "mean ‖∇F(θ)‖², last half",
    "objective": "F(θ) at the end",
    "sign_agreement": "sign agreement, stale and fresh (%)",
    "gain_ratio": "loss gain, stale / fresh",
    "distance": "‖θ(t) − θ(t−τ)‖",
}
AXES = {
    "tau": "staleness τ (steps; its mean if drawn)",
    "effective_tau": "effective staleness τ (steps)",
    "tau_lr": "τ · learning rate, summed over τ steps",
}
AT_RANDOM = {"sign_agreement": 50.0}
"""A measure's chance level: its value if old weights were uninformative."""


def figure_of_runs(
    frame: "pd.DataFrame", measure: str, by: str = "tau", *, log: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """A metric of whole runs against τ: means over seeds, with standard deviations as error bars if there are several.

    Args:
        frame: of `dynamics.study`. measure: such as ``"test_accuracy"``. by: ``"tau"``, ``"effective_tau"`` or
            ``"tau_lr"``. log: logarithmic values.

    Raises:
        ValueError: the frame does not have this measure.
    """
    own = _chosen(frame[frame["phase"] == WHOLE], measure, by)
    axes = _axes(ax, measure, by, log)
    for number, (draw, rows) in enumerate(own.groupby("draw", sort=False)):
        groups = rows.groupby("tau").agg(
            place=(by, "mean"), mean=("value", "mean"), std=("value", "std"), seeds=("seed", "nunique")
        )
        several = bool((groups["seeds"] > 1).any())
        colour, marker = list(PHASE_STYLE.values())[(number + 1) % len(PHASE_STYLE)]
        axes.errorbar(
            groups["place"], groups["mean"], groups["std"] if several else None, color=colour, marker=marker,
            ms=6, capsize=2.5, lw=1.2, label=f"{draw}, seeds: {int(groups['seeds'].min())}",
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    return axes


def figure_of_probes(
    frame: "pd.DataFrame", measure: str, by: str = "tau", *, log: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """Stale versus fresh attacks against τ, one colour per phase of the schedule.

    Against ``"tau"`` and ``"effective_tau"`` it shows means, with standard deviations over probes, workers and seeds
    as error bars; against ``"tau_lr"`` every probe. A dotted line shows the chance level of a percentage.

    Args:
        frame: of `dynamics.study`. measure: ``"sign_agreement"``, ``"gain_ratio"`` or ``"distance"``.

    Raises:
        ValueError: the frame does not have this measure.
    """
    from matplotlib.ticker import NullFormatter

    own = _chosen(frame[frame["phase"] != WHOLE], measure, by)
    axes = _axes(ax, measure, by, log)
    # Early in a run τ is limited by the step's number.
    own = own[own["effective_tau"] > 0] if by == "tau_lr" else own
    for name in PHASES:
        rows = own[own["phase"] == name]
        if rows.empty:
            continue
        colour, marker = PHASE_STYLE[name]
        if by == "tau_lr":
            axes.plot(rows[by], rows["value"], marker, color=colour, ms=4, alpha=0.6, mew=0, label=name)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            groups = rows.groupby(by)["value"].agg(["mean", "std"])
            axes.errorbar(
                groups.index, groups["mean"], groups["std"].fillna(0), color=colour, marker=marker, ms=5,
                capsize=2, lw=1.2, label=name,
            )  # fmt: skip
    if measure in AT_RANDOM:
        axes.axhline(AT_RANDOM[measure], color="#777777", lw=0.8, ls=":")
    axes.legend(frameon=False, fontsize=8)
    return axes


def page(frame: "pd.DataFrame", columns: int = 3) -> "Figure":
    """Accuracy and sharpness, or the quadratic problem's measures, then stale versus fresh attacks."""
    from matplotlib.figure import Figure

    measures = set(frame.dropna(subset=["value"])["measure"])
    ends = [m for m in ("test_accuracy", "squared_gradient", "top_eigenvalue") if m in measures][:2]
    plots = [(figure_of_runs, measure, "tau") for measure in ends]
    compared = [(m, "effective_tau") for m in ("sign_agreement", "gain_ratio") if m in measures]
    if (frame["effective_tau"] > 0).any():
        compared += [(m, "tau_lr") for m in ("sign_agreement", "distance") if m in measures]
    plots += [(figure_of_probes, measure, by) for measure, by in compared]
    rows = max(1, -(-len(plots) // columns))
    figure = Figure(figsize=(4.2 * columns, 3.7 * rows), layout="constrained")
    for number, (draw, measure, by) in enumerate(plots, 1):
        draw(frame, measure, by, log=measure == "distance", ax=figure.add_subplot(rows, columns, number))
    return figure


def _chosen(frame: "pd.DataFrame", measure: str, by: str) -> "pd.DataFrame":
    if by not in AXES:
        raise unknown("axis", by, AXES)
    measures = set(frame["measure"])
    if measure not in measures:
        raise unknown("measure", measure, measures)
    own = frame[frame["measure"] == measure].dropna(subset=["value"])
    return own.assign(value=100 * own["value"]) if measure in AT_RANDOM else own


def _axes(ax: "Axes | None", measure: str, by: str, log: bool) -> "Axes":
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    axes.set(xlabel=AXES[by], ylabel=LABELS.get(measure, measure))
    if log:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
