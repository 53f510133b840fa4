"""Where a command's rows go: JSON, CSV and a picture, the files checked before any work is done."""

import math
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab.mistakes import writable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Outputs:
    """Files to write; None writes none.

    Raises:
        ValueError: a folder that does not exist, a kind of picture that cannot be drawn.
    """

    json: Path | None = None
    csv: Path | None = None
    figure: Path | None = None

    def __post_init__(self) -> None:
        writable(self.json, self.csv, self.figure)
        if self.figure is not None and self.figure.suffix not in PICTURES:
            raise ValueError(
                f"the figure's name is {self.figure.name!r}; allowed: one that ends in {', '.join(PICTURES)}"
            )

    def write(self, frame: "pd.DataFrame", draw: Callable[[], "Figure"] | None = None) -> None:
        """The frame's rows as ``{"rows": […]}`` and as CSV, and the picture; what is no number becomes null."""
        from conadv_lab.runs import write_json

        if self.json is not None:
            write_json(self.json, {"rows": [_plain(row) for row in frame.to_dict("records")]})
        if self.csv is not None:
            frame.to_csv(self.csv, index=False)
        if self.figure is not None and draw is not None:
            draw().savefig(self.figure, dpi=160, facecolor="white")


def add_options(parser: ArgumentParser) -> None:
    """The three options of a command that is parsed by argparse."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the tidy frame")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write them as CSV")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them: .png, .pdf or .svg")


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    return {
        str(name): None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
