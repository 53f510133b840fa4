"""Pictures of a report: spectrum, layers, sharpness against ρ, landscapes."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from conadv_lab.pages import NEUTRAL
from conadv_lab.sharpness.measures.results import Report

OVER_RHO = ("sam_worst", "sam_average", "adaptive_worst", "adaptive_average")


def _axes(width: float = 6.4, height: float = 3.6, projection: str | None = None) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(projection=projection) if projection else figure.add_subplot()
    for item in (axes.xaxis, axes.yaxis):
        item.label.set_color(NEUTRAL)
    axes.tick_params(colors=NEUTRAL)
    for spine in axes.spines.values():
        spine.set_color(NEUTRAL)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(axes: object) -> None:
    axes.legend(frameon=False, labelcolor=NEUTRAL, fontsize=8)  # type: ignore[attr-defined]


def spectrum(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """The spectral density with its band."""
    if not any("density" in report for _, report in reports):
        return None
    figure, axes = _axes()
    lowest = []
    for name, report in reports:
        if "density" not in report:
            continue
        value, band = report["density"].value, report["density"].error
        (line,) = axes.semilogy(value["grid"], np.maximum(value["density"], 1e-12), lw=1.2, label=name)  # type: ignore[attr-defined]
        axes.fill_between(value["grid"], band["low"], band["high"], color=line.get_color(), alpha=0.25, lw=0)  # type: ignore[attr-defined]
        lowest.append(max(value["density"]) * 1e-6)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(min(lowest), None))  # type: ignore[attr-defined]
    _legend(axes)
    return figure


def layers(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """Top eigenvalue and trace of each layer's block."""
    names = [n for n in ("layer_top_eigenvalues", "layer_traces") if any(n in r for _, r in reports)]
    if not names:
        return None
    figure, axes = _axes(height=4.2)
    for name, report in reports:
        for measure in names:
            if measure in report:
                values = report[measure].value
                what = "λmax" if measure == "layer_top_eigenvalues" else "trace"
                axes.plot(list(values.values()), list(values), "o", ms=4, label=f"{name}: {what}")  # type: ignore[attr-defined]
    axes.set(xlabel="of the layer's block of the Hessian")  # type: ignore[attr-defined]
    axes.invert_yaxis()  # type: ignore[attr-defined]
    _legend(axes)
    return figure


def against_rho(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """Worst and average case over ρ."""
    found = [(n, r[m]) for n, r in reports for m in OVER_RHO if m in r]
    if not found:
        return None
    figure, axes = _axes()
    for name, measure in found:
        rhos = [float(r) for r in measure.value]
        axes.plot(rhos, list(measure.value.values()), "o-", ms=3, lw=1.2, label=f"{name}: {measure.name}")  # type: ignore[attr-defined]
    axes.set(xlabel="ρ", ylabel="rise of the loss", xscale="log", yscale="symlog")  # type: ignore[attr-defined]
    _legend(axes)
    return figure


def line(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """The loss along a random filter-normalised direction."""
    found = [(n, r["landscape_line"].value) for n, r in reports if "landscape_line" in r]
    if not found:
        return None
    figure, axes = _axes()
    for name, value in found:
        axes.semilogy(value["axes"][0], value["losses"], lw=1.2, label=name)  # type: ignore[attr-defined]
    axes.set(xlabel="along a filter-normalised direction", ylabel="loss")  # type: ignore[attr-defined]
    _legend(axes)
    return figure


def between(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    """The loss on the line to another solution."""
    found = [(n, r["landscape_between"]) for n, r in reports if "landscape_between" in r]
    if not found:
        return None
    figure, axes = _axes()
    for name, measure in found:
        axes.semilogy(measure.value["axes"][0], measure.value["losses"], lw=1.2, label=name)  # type: ignore[attr-defined]
    for end in (0, 1):
        axes.axvline(end, color=NEUTRAL, lw=0.6, ls=":")  # type: ignore[attr-defined]
    axes.set(xlabel=str(found[0][1].conditions["directions"]), ylabel="loss")  # type: ignore[attr-defined]
    _legend(axes)
    return figure


def contours(name: str, report: Report, measure: str) -> Figure | None:
    """A plane's losses as contours, the levels spaced in the logarithm."""
    if measure not in report or len(report[measure].value["axes"]) != 2:
        return None
    value = report[measure].value
    losses = np.log10(np.maximum(np.array(value["losses"]), 1e-12)).T
    figure, axes = _axes(5, 4)
    drawn = axes.contourf(*value["axes"], losses, levels=18, cmap="viridis")  # type: ignore[attr-defined]
    bar = figure.colorbar(drawn)
    bar.set_label("log₁₀ loss", color=NEUTRAL)
    bar.ax.tick_params(colors=NEUTRAL)
    axes.set(xlabel="first direction", ylabel="second direction")  # type: ignore[attr-defined]
    axes.set_title(name, color=NEUTRAL, fontsize=9)  # type: ignore[attr-defined]
    return figure


def surface(name: str, report: Report, measure: str) -> Figure | None:
    """A plane's losses as a surface."""
    if measure not in report or len(report[measure].value["axes"]) != 2:
        return None
    value = report[measure].value
    figure, axes = _axes(5, 4, "3d")
    first, second = np.meshgrid(*value["axes"], indexing="ij")
    axes.plot_surface(first, second, np.array(value["losses"]), cmap="viridis", lw=0)  # type: ignore[attr-defined]
    axes.set_title(f"{name}: loss", color=NEUTRAL, fontsize=9)  # type: ignore[attr-defined]
    return figure


SHARED: dict[str, tuple[str, Callable[[Sequence[tuple[str, Report]]], Figure | None]]] = {
    "spectrum": ("Spectral density of the Hessian", spectrum),
    "layers": ("Curvature by layer", layers),
    "rho": ("Sharpness against ρ", against_rho),
    "line": ("Loss along a random direction", line),
    "between": ("Loss on the line between two solutions", between),
}
PLANES = {
    "landscape_plane": "Loss over two random directions",
    "landscape_eigen": "Loss over two top eigenvectors",
}


def pictures(reports: Sequence[tuple[str, Report]]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, title, figure) of everything that the reports have."""
    for key, (title, draw) in SHARED.items():
        if (figure := draw(reports)) is not None:
            yield key, title, figure
    for index, (name, report) in enumerate(reports):
        for measure, title in PLANES.items():
            for kind, draw_one in (("contours", contours), ("surface", surface)):
                if (figure := draw_one(name, report, measure)) is not None:
                    yield f"{measure}-{kind}-{index}", f"{title}, {kind}", figure
