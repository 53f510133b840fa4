"""The command: ``python -m conadv_lab.staleness report``."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from conadv_lab import cli
from conadv_lab.mistakes import writable
from conadv_lab.outputs import Tables
from conadv_lab.pages import write


@dataclass(frozen=True)
class PageOptions:
    """One self-contained page, and its figures and table on request."""

    html: Path
    """The page."""
    cluster: str = "h100"
    """A built-in name or a TOML file."""
    recipe: str = "imagenet-resnet50-32k"
    """What is trained."""
    devices: int = 512
    """Of the what-if table."""
    dynamics: Path | None = None
    """Rows of the dynamics (.csv or .json) whose accuracy and sharpness against τ are drawn too."""
    figures: Path | None = None
    """Folder for the figures as PNG and PDF."""
    seed: int = 0
    """Of stragglers and interruptions."""
    files: tyro.conf.OmitArgPrefixes[Tables] = field(default_factory=Tables)


def main(words: list[str]) -> int:
    """Write the page."""
    from conadv_lab.staleness.report import page

    asked = cli.parsed(PageOptions, words, "conadv_lab.staleness report")
    asked.files.require_writable()
    writable(asked.html)
    if asked.figures is not None and asked.figures.exists() and not asked.figures.is_dir():
        raise ValueError(f"{asked.figures} is a file; allowed: a folder, or a name that is free")
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
