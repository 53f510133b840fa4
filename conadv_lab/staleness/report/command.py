"""The command: ``python -m conadv_lab.staleness report``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from conadv_lab import cli
from conadv_lab.mistakes import creatable, writable
from conadv_lab.outputs import Tables
from conadv_lab.pages import write


@dataclass(frozen=True)
class PageOptions:
    """One self-contained page, and its figures and table on request."""

    html: Path
    """File for the page."""
    cluster: str = "h100"
    """Built-in cluster name or TOML file."""
    recipe: str = "imagenet-resnet50-32k"
    """The recipe to simulate."""
    devices: int = 512
    """Number of devices in the what-if table."""
    dynamics: Path | None = None
    """Rows of the dynamics (.csv or .json), to plot accuracy and sharpness against τ too."""
    figures: Path | None = None
    """Folder for the figures as PNG and PDF."""
    seed: int = 0
    """Seed of stragglers and interruptions."""
    files: Annotated[Tables, cli.OUTPUT_FILES] = field(default_factory=Tables)


def main(words: list[str]) -> int:
    """Write the page."""
    from conadv_lab.staleness.report import page

    asked = cli.parsed(PageOptions, words, "conadv_lab.staleness report")
    asked.files.require_writable()
    writable(asked.html)
    if asked.figures is not None:
        creatable(asked.figures, "--figures")
    made = page.build(
        asked.cluster,
        asked.recipe,
        devices=asked.devices,
        seed=asked.seed,
        dynamics=page.read_rows(asked.dynamics),
    )
    write(asked.html, made.html)
    asked.files.write(made.rows)
    if asked.figures is not None:
        page.save_figures(made, asked.figures)
    print(asked.html)
    return 0
