"""Figures of the simulator: steps by device, step time and speed-up, effective τ, the fit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from conadv_lab.methods import METHODS
from conadv_lab.pages import NEUTRAL, neutral
from conadv_lab.staleness.timeline.recursion import Timeline

if TYPE_CHECKING:
    import pandas as pd

PASSES = {
    "attack": "#D55E00", "ascent": "#D55E00", "clean": "#0072B2", "altered": "#56B4E9", "train": "#0072B2",
    "waits, all-reduce": "#BBBBBB",
}  # fmt: skip


def _line(method: str, dashes: str = "-", label: str | None = None) -> tuple[str, str, str, str]:
    kind = METHODS[method]
    return label or kind.label, kind.colour, kind.marker, dashes


LINES: dict[str, tuple[str, str, str, str]] = {
    "vanilla": _line("vanilla"),
    "disadv": _line("disadv"),
    "stream": _line("conadv", label="ConAdv, parallel stream"),
    "ranks": ("ConAdv, best share of attackers (ranks)", "#CC79A7", "X", "-"),
    "spare": ("ConAdv, one attacker per worker (twice the devices)", "#CC79A7", "X", ":"),
    "recycled": _line("recycled"),
    "recycled-equal": _line("recycled-equal", ":"),
}
"""Label, colour, marker and dashes of each line."""


def _figure(columns: int = 1, height: float = 3.8, rows: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(7.2 if columns == 1 else 10.4, height), layout="constrained")
    drawn = [figure.add_subplot(rows, columns, n + 1) for n in range(rows * columns)]
    return neutral(figure), drawn


def gantt(named: Sequence[tuple[str, Timeline]], steps: int = 3) -> Figure:
    """What each device does in the first steps, one panel per timeline; lines mark the ends of steps."""
    figure, panels = _figure(height=1.0 + 2.1 * len(named), rows=len(named))
    end = max(done.ends[min(steps, len(done.ends)) - 1] for _, done in named)
    for axes, (title, done) in zip(panels, named, strict=True):
        last: dict[tuple[int, int], float] = {}
        for row in done.spans(steps):
            # Two streams of a device share its row, one above the other.
            height = 0.8 / row["lanes"]
            shift = (row["lane"] + 0.5) * height - 0.4
            _bar(axes, row["device"] + shift, row["start"], row["end"], PASSES[row["what"]], height)
            key = row["device"], row["step"]
            last[key] = max(last.get(key, 0.0), row["end"])
        for (device, step), begun in last.items():
            if device < done.times.trainers:
                _bar(axes, device, begun, done.ends[step], PASSES["waits, all-reduce"], 0.8)
        for moment in done.ends[:steps]:
            axes.axvline(1e3 * moment, color=NEUTRAL, lw=0.8)
        roles = ["attacker" if n >= done.times.trainers else str(n) for n in range(done.times.devices)]
        axes.set_yticks(range(done.times.devices), roles, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1e3 * end)
        axes.set_title(title, fontsize=9, loc="left", color=NEUTRAL)
        axes.set_ylabel("device")
    panels[-1].set_xlabel("ms")
    names = {"attack": "attack", "clean": "train, clean", "altered": "train, adversarial"}
    marks = [Patch(color=PASSES[key], label=label) for key, label in names.items()]
    marks.append(Patch(color=PASSES["waits, all-reduce"], label="waits, all-reduce, optimiser"))
    figure.legend(
        handles=marks, loc="outside lower center", ncols=4, frameon=False, labelcolor=NEUTRAL, fontsize=8
    )
    return figure


def _bar(axes: Any, place: float, start: float, end: float, colour: str, height: float) -> None:
    axes.barh(place, 1e3 * (end - start), left=1e3 * start, height=height, color=colour, lw=0)


def step_and_speed_up(frame: "pd.DataFrame", against: str, label: str) -> Figure:
    """Step time of every line and its speed-up over DisAdv; ``frame`` has one row per line and x value."""
    figure, (left, right) = _figure(2)
    base = frame[frame["line"] == "disadv"].set_index(against)["step_ms"]
    for name, (told, colour, marker, dashes) in LINES.items():
        own = frame[frame["line"] == name].sort_values(against)
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "ls": dashes,
            "ms": 4,
            "lw": 1.2,
            "label": told,
        }
        if name == "vanilla":
            # Black is invisible on a dark page; recycled-equal's points coincide with vanilla's.
            style |= {"color": NEUTRAL, "ms": 8, "mfc": "none"}
        left.loglog(own[against], own["step_ms"], **style)
        if name in ("stream", "ranks", "spare"):
            right.semilogx(own[against], base.loc[own[against]].to_numpy() / own["step_ms"], **style)
    right.axhline(1, color=NEUTRAL, lw=0.8)
    left.set(xlabel=label, ylabel="step (ms), predicted")
    right.set(xlabel=label, ylabel="speed-up over DisAdv, predicted")
    for axes in (left, right):
        axes.set_xticks(
            ticks := _thinned(sorted(frame[against].unique())), [f"{t:,.0f}" for t in ticks], fontsize=8
        )
        axes.minorticks_off()
    marks, told_marks = left.get_legend_handles_labels()
    figure.legend(
        marks, told_marks, loc="outside lower center", ncols=3, frameon=False, labelcolor=NEUTRAL, fontsize=8
    )
    return figure


def _thinned(places: list[float]) -> list[float]:
    return places[:: max(1, len(places) // 6)]


def effective_tau(frame: "pd.DataFrame") -> Figure:
    """Fraction of (step, worker) pairs at each effective τ; columns ``tau``, ``share``, ``effective``, ``part``."""
    taus = sorted(frame["tau"].unique())
    figure, panels = _figure(len(taus), height=3.0)
    colours = colormaps["viridis"]
    for axes, tau in zip(panels, taus, strict=True):
        own = frame[frame["tau"] == tau]
        shares = sorted(own["share"].unique())
        bottom = np.zeros(len(shares))
        for effective in range(int(tau) + 1):
            rows = own[own["effective"] == effective].set_index("share")["part"]
            parts = np.array([rows.get(share, 0.0) for share in shares])
            colour = colours(1 - effective / tau)
            axes.bar(range(len(shares)), parts, bottom=bottom, color=colour, label=f"{effective}", width=0.7)
            bottom += parts
        axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares], fontsize=8)
        axes.set(xlabel="devices that attack", ylabel="fraction of (step, worker) pairs")
        axes.set_title(f"nominal τ = {tau}; effective:", color=NEUTRAL, fontsize=9, loc="left")
        marks, told = axes.get_legend_handles_labels()
        axes.legend(
            marks[::-1], told[::-1], frameon=False, labelcolor=NEUTRAL, fontsize=7, loc="center left",
            bbox_to_anchor=(1.0, 0.5), handlelength=1,
        )  # fmt: skip
    return figure


def residuals(frame: "pd.DataFrame") -> Figure:
    """Predicted / measured for the published rows; filled points were used in the fit, the band is the tolerance."""
    names = list(frame["cluster"].unique())
    figure, panels = _figure(len(names), height=3.0)
    for axes, name in zip(panels, names, strict=True):
        own = frame[frame["cluster"] == name]
        tolerance = own["tolerance"].iloc[0]
        axes.axhspan(1 - tolerance, 1 + tolerance, color="#009E73", alpha=0.12, lw=0)
        axes.axhline(1, color=NEUTRAL, lw=0.8)
        for kind, face in (("yes", "#0072B2"), ("no", "none")):
            rows = own[own["fitted"] == kind]
            told = "fitted" if kind == "yes" else "held out"
            axes.semilogx(rows["devices"], rows["ratio"], "o", mfc=face, mec="#0072B2", label=told)
        axes.set(xlabel=f"{name.upper()} devices", ylabel="predicted / measured step", ylim=(0.8, 1.2))
        axes.set_xticks(own["devices"], [f"{n:,}" for n in own["devices"]], fontsize=7, rotation=45)
        axes.minorticks_off()
        axes.legend(frameon=False, labelcolor=NEUTRAL, fontsize=8)
    return figure
