"""Self-contained HTML pages: a package's template in a shared frame, with figures as inline SVG.

All pages are readable in light and dark mode, on a phone and in print, and load nothing.
"""

import io
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEUTRAL = "#777777"
"""Colour of text and lines in figures, readable on white and black; a page replaces it by its text colour."""


def render(template: str, **values: Any) -> str:
    """Render a template, given by its path in this package, such as ``sharpness/report/page.html``.

    The template extends ``page.html`` and fills its blocks ``title``, ``style`` (if it needs more) and ``body``.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def text(name: str) -> str:
        return (files("conadv_lab") / name).read_text(encoding="utf-8")

    environment = Environment(loader=FunctionLoader(text), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def write(path: Path, page: str) -> None:
    """Write to a temporary file and rename it, so that a reader never sees half a page."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)


def neutral(figure: "Figure") -> "Figure":
    """Make the figure's text and frames readable on light and dark pages, in place; returns the figure."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=NEUTRAL, which="both")
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(NEUTRAL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(NEUTRAL)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        for text in legend.get_texts() if legend is not None else ():
            text.set_color(NEUTRAL)
    return figure


def svg(figure: "Figure") -> str:
    """The figure as SVG without a fixed size; neutral and black parts take the colour of the page's text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(NEUTRAL, "currentColor").replace("#000000", "currentColor")
    opening, closing, rest = text.partition(">")
    # matplotlib omits black fills, so set the default fill on the root.
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ' fill="currentColor"' + closing + rest


def save(figure: "Figure", folder: Path, name: str) -> None:
    """The figure as PNG, on white, and as PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    figure.savefig(folder / f"{name}.pdf")
