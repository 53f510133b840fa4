"""Tables for readers, HTML in notebooks and Markdown in documents, and whether to show progress bars."""

import sys
from collections.abc import Iterable, Sequence
from html import escape

NUMBER = "text-align:right;font-variant-numeric:tabular-nums"
TEXT = "text-align:left"


def in_notebook() -> bool:
    """Whether this process is a notebook kernel, which can show bars although stderr is not a terminal."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and hasattr(get_ipython(), "kernel")


def number(value: object, digits: int = 4) -> str:
    """A number formatted for readers; other values as text, ``None`` as an empty string.

    >>> [number(value) for value in (0.123456, 1234567, 25024.0, 3, None, "sgd")]
    ['0.1235', '1,234,567', '25,024', '3', '', 'sgd']
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """An HTML table; numbers are right-aligned, everything is escaped, colours are the page's own.

    >>> table(["measure", "value"], [["trace", 0.5]])[:33]
    '<table><thead><tr><th style="text'
    """
    titles = "".join(f'<th style="{TEXT}">{escape(name)}</th>' for name in head)
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    told = f'<caption style="{TEXT};caption-side:top">{escape(caption)}</caption>' if caption else ""
    return f"<table>{told}<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    >>> print(markdown(["batch", "loss"], [[8, 0.5]]))
    | batch | loss |
    |---|---|
    | 8 | 0.5 |
    """
    title, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([title, "|---" * len(head) + "|", *lines])


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td style="{NUMBER if is_number else TEXT}">{escape(number(value))}</td>'
