"""A command's output files: JSON, CSV and a figure, checked before any work is done."""

import csv
import math
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
class Tables:
    """Files to write in addition to the printed table."""

    json: Path | None = None
    """Write the table's rows as JSON, {"rows": […]}."""
    csv: Path | None = None
    """Write the rows as CSV."""

    def require_writable(self) -> None:
        """Check the paths; call it before any work.

        Raises:
            ValueError: a folder does not exist, or the figure's format is not supported.
        """
        writable(self.json, self.csv)

    def write(self, frame: "pd.DataFrame") -> None:
        """Write the frame's rows to the requested files."""
        rows = frame.to_dict("records")
        if self.json is not None:
            write_json(self.json, {"rows": rows})
        if self.csv is not None:
            write_csv(self.csv, rows)


@dataclass(frozen=True)
class Outputs(Tables):
    """Files to write in addition to the printed table."""

    figure: Path | None = None
    """Write a figure: .png, .pdf or .svg."""

    def require_writable(self) -> None:
        super().require_writable()
        writable(self.figure)
        if self.figure is not None and self.figure.suffix not in FIGURES:
            raise ValueError(
                f"the figure's name is {self.figure.name!r}; allowed: a name that ends in {', '.join(FIGURES)}"
            )

    def write_figure(self, made: Callable[[], "Figure"]) -> None:
        """Make and save the figure, if requested."""
        if self.figure is not None:
            made().savefig(self.figure, dpi=160, facecolor="white")


def write_json(path: Path, content: Any) -> None:
    """Write a table or report as JSON: keys as text, NaN and infinities as null, other objects as text."""
    from conadv_lab import files

    files.write_json(path, _plain(content))


def write_csv(path: Path, rows: Sequence[Mapping[Any, Any]]) -> None:
    """Write rows with equal keys as CSV with a header; NaN and None as empty cells."""
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
