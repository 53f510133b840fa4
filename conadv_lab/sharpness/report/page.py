"""A report as one self-contained page, as JSON and as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conadv_lab import outputs
from conadv_lab.displays import number
from conadv_lab.pages import render, svg
from conadv_lab.sharpness.measures.results import CONDITIONS, Measure, Report
from conadv_lab.sharpness.report.comparison import compare, correlations
from conadv_lab.sharpness.report.figures import pictures

Named = tuple[str, Report]
SHOWN_IN_FULL = 6


def _complete(reports: Sequence[Named]) -> None:
    for name, report in reports:
        report.complete(name)


def write_json(reports: Sequence[Named], path: Path, **more: Any) -> None:
    """``{"measures": […]}`` of all reports; each measure's conditions name its subject."""
    _complete(reports)
    measures = [m for _, report in reports for m in report.to_dict()["measures"]]
    outputs.write_json(path, {"measures": measures} | more)


def write_csv(reports: Sequence[Named], path: Path) -> None:
    """One row per number: subject, measure, part (ρ, list index, layer), value, error and the conditions."""
    _complete(reports)
    rows = [
        {"subject": name, "measure": m.name, "part": part, "value": value, "error": error, "products": m.products,
         "seconds": m.seconds} | {key: m.conditions[key] for key in CONDITIONS}
        for name, report in reports for m in report.measures for part, value, error in m.parts()
    ]  # fmt: skip
    outputs.write_csv(path, rows)


def _shown(measure: Measure) -> str:
    parts = measure.parts()
    if not parts:
        return "see the figure"
    texts = []
    for part, value, error in parts[:SHOWN_IN_FULL]:
        text = f"{value:.4g}" + ("" if error is None else f" ± {error:.1g}")
        texts.append(f"{part}: {text}" if isinstance(measure.value, dict) else text)
    return "; ".join(texts) + ("; …" if len(parts) > SHOWN_IN_FULL else "")


def _price(measure: Measure) -> str:
    told = measure.conditions
    counts = {
        "products": measure.products or None,
        "gradients": told.get("gradients"),
        "forwards": told.get("forwards"),
    }
    prices = [
        f"{count:.3g} {what if count != 1 else what.removesuffix('s')}"
        for what, count in counts.items()
        if isinstance(count, (int, float))
    ]
    return ", ".join(prices)


def page(reports: Sequence[Named], checks: Sequence[tuple[str, Sequence[tuple[str, str, str]]]] = ()) -> str:
    """The report as an HTML page with its figures.

    Args:
        reports: (name, report) of each subject.
        checks: for each cross-checked subject, its rows of (quantity, ours, PyHessian's).

    Raises:
        ValueError: a number lacks metadata, see `Report.complete`.
    """
    _complete(reports)
    subjects = []
    for name, report in reports:
        rows = [
            {
                "name": m.name,
                "value": _shown(m),
                "price": _price(m),
                "seconds": f"{m.seconds:.2f}",
                "rescaling": m.conditions.get("under_rescaling", ""),
                "converged": m.conditions.get("converged"),
                "note": "; ".join(map(str, m.conditions.get("not_exact_because", [])))
                or m.conditions.get("note", ""),
            }
            for m in report.measures
        ]
        conditions = {k.replace("_", " "): _plain(v) for k, v in report.conditions.items()}
        subjects.append({"name": name, "rows": rows, "conditions": conditions})
    drawn = [{"title": title, "svg": svg(figure)} for _, title, figure in pictures(reports)]
    return render(
        "sharpness/report/page.html",
        subjects=subjects,
        pictures=drawn,
        checks=checks,
        compared=_compared(reports) if len(reports) > 1 else None,
        correlations=correlations([r for _, r in reports]),
    )


def _compared(reports: Sequence[Named]) -> dict[str, Any]:
    """Measures × runs, as text."""
    frame = compare(reports)
    rows = [
        {
            "name": name.replace("_", " "),
            "cells": [number(None if value != value else value) for value in row],
        }
        for name, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)
    ]
    return {"runs": list(frame.columns), "rows": rows}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)
