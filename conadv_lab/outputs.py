"""Where a command's rows go: JSON, CSV and a figure, the files checked before any work is done."""

import csv
import math
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab.mistakes import writable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Outputs:
    """Files to write; None writes none.

    Raises:
        ValueError: a folder that does not exist, a kind of figure that cannot be drawn.
    """

    json: Path | None = None
    csv: Path | None = None
    figure: Path | None = None

    def __post_init__(self) -> None:
        writable(self.json, self.csv, self.figure)
        if self.figure is not None and self.figure.suffix not in FIGURES:
            raise ValueError(
                f"the figure's name is {self.figure.name!r}; allowed: one that ends in {', '.join(FIGURES)}"
            )

    def write(self, frame: "pd.DataFrame", draw: Callable[[], "Figure"] | None = None) -> None:
        """The frame's rows as ``{"rows": […]}`` and as CSV, and the figure."""
        rows = frame.to_dict("records")
        if self.json is not None:
            write_json(self.json, {"rows": rows})
        if self.csv is not None:
            write_csv(self.csv, rows)
        if self.figure is not None and draw is not None:
            draw().savefig(self.figure, dpi=160, facecolor="white")


def add_options(parser: ArgumentParser) -> None:
    """The three options of a command that is parsed by argparse."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the tidy frame")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write them as CSV")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them: .png, .pdf or .svg")


def write_json(path: Path, content: Any) -> None:
    """Write what a table or a report holds: keys as text, NaN and infinities as null, other objects as text."""
    from conadv_lab import files

    files.write_json(path, _plain(content))


def write_csv(path: Path, rows: Sequence[Mapping[Any, Any]]) -> None:
    """Write rows that share their keys, under a line of these; NaN and None as empty cells."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if value != value else value for name, value in row.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
