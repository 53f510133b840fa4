"""One self-contained HTML page: a template of a room in a head that all share, figures within it as SVG.

All pages are readable in bright and dark mode, on a phone and in print, and load nothing.
"""

import io
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEUTRAL = "#777777"
"""Text and lines of figures, readable on white and on black; in a page it becomes the text's own colour."""


def render(template: str, **values: Any) -> str:
    """The page of a template, named by its place in this package, such as ``sharpness/report/page.html``.

    The template extends ``page.html`` and fills its blocks ``title``, ``style`` (what it alone needs) and ``body``.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def text(name: str) -> str:
        return (files("conadv_lab") / name).read_text(encoding="utf-8")

    environment = Environment(loader=FunctionLoader(text), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def write(path: Path, page: str) -> None:
    """Write beside and rename, so that a reader never sees half a page."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)


def neutral(figure: "Figure") -> "Figure":
    """The figure itself, its text and frames made readable on a bright and on a dark page."""
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
    """The figure as SVG for a page: no size of its own; what is neutral or black has the colour of the page's text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(NEUTRAL, "currentColor").replace("#000000", "currentColor")
    opening, closing, rest = text.partition(">")
    # Black is not written where something is filled with it, so the root says what is meant.
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ' fill="currentColor"' + closing + rest


def save(figure: "Figure", folder: Path, name: str) -> None:
    """The figure as PNG, on white, and as PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    figure.savefig(folder / f"{name}.pdf")
