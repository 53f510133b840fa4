"""Figures of a report: spectrum, layers, sharpness against ρ, landscapes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from conadv_lab.pages import NEUTRAL, svg
from conadv_lab.sharpness.measures.results import Measure, Report

Named = tuple[str, Report]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, one per run; markers differ too, for print."""
MARKERS = ("o", "s", "^", "D", "v", "P")
RADII = {
    "sam": "ρ, L2 norm of the perturbation",
    "adaptive_worst": "adaptive ρ, L2 norm of the relative perturbation",
    "adaptive_average": "relative ρ, std. of each weight's relative perturbation",
}
"""Measures over a radius, by the prefix of their names; radii have no common scale, so each kind has its own axis."""
OF_LAYERS = {
    "layer_top_eigenvalues": "top eigenvalue λ of the layer's block",
    "layer_traces": "trace of the layer's block",
}


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 4,
        "lw": 1.2,
    }


def _neutral(axes: Axes) -> Axes:
    """Text and frame in a colour that is visible on light and dark pages."""
    for item in (axes.xaxis, axes.yaxis):
        item.label.set_color(NEUTRAL)
    axes.tick_params(colors=NEUTRAL, which="both")
    for spine in axes.spines.values():
        spine.set_color(NEUTRAL)
    axes.patch.set_alpha(0)
    return axes


def _axes(width: float = 6.4, height: float = 3.6, projection: str | None = None) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure, _neutral(figure.add_subplot(projection=projection))


def _legend(axes: Axes) -> None:
    if not axes.get_legend_handles_labels()[1]:  # one unnamed model
        return
    axes.legend(frameon=False, labelcolor=NEUTRAL, fontsize=8)


def spectrum(reports: Sequence[Named]) -> Figure | None:
    """The spectral density with its band."""
    if not any("density" in report for _, report in reports):
        return None
    figure, axes = _axes()
    lowest = []
    for index, (name, report) in enumerate(reports):
        if "density" not in report:
            continue
        value, band = report["density"].value, report["density"].error
        colour = COLOURS[index % len(COLOURS)]
        axes.semilogy(value["grid"], np.maximum(value["density"], 1e-12), lw=1.2, label=name, color=colour)
        axes.fill_between(value["grid"], band["low"], band["high"], color=colour, alpha=0.25, lw=0)
        lowest.append(max(value["density"]) * 1e-6)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density (fraction of eigenvalues per unit)")
    axes.set_ylim(min(lowest), 3e6 * max(lowest))
    _legend(axes)
    return figure


def layers(reports: Sequence[Named], measure: str) -> Figure | None:
    """Top eigenvalue or trace of each layer's block of the Hessian."""
    found = [
        (index, name, report[measure].value)
        for index, (name, report) in enumerate(reports)
        if measure in report
    ]
    if not found:
        return None
    figure, axes = _axes(height=1.4 + 0.22 * max(len(values) for _, _, values in found))
    for index, name, values in found:
        axes.plot(list(values.values()), list(values), label=name, **_look(index) | {"lw": 0})
    axes.set_xlabel(OF_LAYERS[measure])
    axes.grid(axis="y", color=NEUTRAL, linewidth=0.3)
    axes.invert_yaxis()
    _legend(axes)
    return figure


def against_rho(reports: Sequence[Named], kind: str) -> Figure | None:
    """Worst-case (solid) and average (dashed) rise of the loss over one kind of radius."""
    found = [(index, name, m) for index, (name, report) in enumerate(reports) for m in _over(report, kind)]
    if not found:
        return None
    figure, axes = _axes()
    for index, name, measure in found:
        told = f"{name}: {measure.name.replace('_', ' ')}".removeprefix(": ")
        look = _look(index) | ({"ls": "--", "mfc": "none"} if "average" in measure.name else {})
        axes.plot(list(measure.value), list(measure.value.values()), label=told, **look)
    axes.set(xlabel=RADII[kind], ylabel="rise in loss", xscale="log")
    if min(min(measure.value.values()) for _, _, measure in found) > 0:
        axes.set_yscale("log")
    radii = sorted({radius for _, _, measure in found for radius in measure.value})
    axes.set_xticks(radii[:: max(1, len(radii) // 6)])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08, y=0.08)
    _legend(axes)
    return figure


def _over(report: Report, kind: str) -> list[Measure]:
    return [m for m in report.measures if m.name.startswith(kind) and isinstance(m.value, dict)]


def line(reports: Sequence[Named]) -> Figure | None:
    """The loss along a random filter-normalised direction."""
    found = [(n, r["landscape_line"].value) for n, r in reports if "landscape_line" in r]
    if not found:
        return None
    figure, axes = _axes()
    for index, (name, value) in enumerate(found):
        axes.semilogy(value["axes"][0], value["losses"], label=name, markevery=0.1, **_look(index))
    axes.set(xlabel="distance along the direction (in filter norms)", ylabel="loss")
    _legend(axes)
    return figure


def between(reports: Sequence[Named]) -> Figure | None:
    """The loss on the line to another solution."""
    found = [(n, r["landscape_between"]) for n, r in reports if "landscape_between" in r]
    if not found:
        return None
    figure, axes = _axes()
    for index, (name, measure) in enumerate(found):
        axes.semilogy(
            measure.value["axes"][0], measure.value["losses"], label=name, markevery=0.1, **_look(index)
        )
    for end in (0, 1):
        axes.axvline(end, color=NEUTRAL, lw=0.6, ls=":")
    axes.set(xlabel=str(found[0][1].conditions["directions"]), ylabel="loss")
    _legend(axes)
    return figure


def contours(name: str, report: Report, measure: str) -> Figure | None:
    """A plane's losses as contours with logarithmic levels."""
    if measure not in report or len(report[measure].value["axes"]) != 2:
        return None
    value = report[measure].value
    losses = np.log10(np.maximum(np.array(value["losses"]), 1e-12)).T
    figure, axes = _axes(5, 4)
    drawn = axes.contourf(*value["axes"], losses, levels=18, cmap="viridis")
    bar = figure.colorbar(drawn)
    bar.set_label("log₁₀ loss", color=NEUTRAL)
    bar.ax.tick_params(colors=NEUTRAL)
    axes.set(xlabel="first direction", ylabel="second direction")
    axes.set_title(name, color=NEUTRAL, fontsize=9)
    return figure


def surface(name: str, report: Report, measure: str) -> Figure | None:
    """A plane's losses as a surface."""
    if measure not in report or len(report[measure].value["axes"]) != 2:
        return None
    value = report[measure].value
    figure, axes = _axes(5, 4, "3d")
    first, second = np.meshgrid(*value["axes"], indexing="ij")
    axes.plot_surface(first, second, np.array(value["losses"]), cmap="viridis", lw=0)
    axes.set(xlabel="first direction", ylabel="second direction")
    axes.set_zlabel("loss", color=NEUTRAL)
    axes.set_title(name, color=NEUTRAL, fontsize=9)
    return figure


SHARED: dict[str, tuple[str, Callable[[Sequence[Named]], Figure | None]]] = {
    "spectrum": ("Spectral density of the Hessian", spectrum),
    "layers": ("Top eigenvalue by layer", partial(layers, measure="layer_top_eigenvalues")),
    "layer_traces": ("Trace by layer", partial(layers, measure="layer_traces")),
    "rho": ("Sharpness against ρ", partial(against_rho, kind="sam")),
    "adaptive_rho": ("Adaptive sharpness against ρ, worst case", partial(against_rho, kind="adaptive_worst")),
    "relative_rho": ("Adaptive sharpness against ρ, average", partial(against_rho, kind="adaptive_average")),
    "line": ("Loss along a random direction", line),
    "between": ("Loss along the line between two solutions", between),
}
PLANES = {
    "landscape_plane": "Loss over two random directions",
    "landscape_eigen": "Loss over the top two eigenvectors",
}


def pictures(reports: Sequence[Named]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, title, figure) of everything in the reports."""
    for key, (title, draw) in SHARED.items():
        if (figure := draw(reports)) is not None:
            yield key, title, figure
    for index, (name, report) in enumerate(reports):
        for measure, title in PLANES.items():
            for kind, draw_one in (("contours", contours), ("surface", surface)):
                if (figure := draw_one(name, report, measure)) is not None:
                    yield f"{measure}-{kind}-{index}", f"{title}, {kind}", figure


class Pictures(dict[str, Figure]):
    """Figures by title; a notebook shows all of them, one below the other."""

    def _repr_html_(self) -> str:
        return "".join(
            f'<figure style="max-width:48rem"><figcaption>{escape(title)}</figcaption>{svg(figure)}</figure>'
            for title, figure in self.items()
        )


def figures(reports: Report | Mapping[str, Report]) -> Pictures:
    """Spectrum, layers, sharpness against ρ and landscapes of one or several reports, if they were measured.

    Args:
        reports: one report, or several by legend label.

    >>> list(figures(Report(())))
    []
    """
    named = [("", reports)] if isinstance(reports, Report) else list(reports.items())
    return Pictures({title: figure for _, title, figure in pictures(named)})
