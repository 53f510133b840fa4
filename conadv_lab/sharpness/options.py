"""Options of ``python -m conadv_lab.sharpness``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class SharpnessOptions:
    """What to measure, on which data, and where to write it."""

    places: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PLACE ...", help_behavior_hint="")
    ] = ()
    """Run folders, checkpoint folders or path/to/file.py:function; several are compared."""
    html: Path | None = None
    """Write one self-contained HTML page."""
    json: Path | None = None
    """Write the numbers and their conditions as JSON."""
    csv: Path | None = None
    """Write one row per number as CSV."""
    figures: Path | None = None
    """Write the figures into this folder as PNG and PDF."""
    also: str = ""
    """Measures A,B,… in addition to the default ones, such as density,sam_worst."""
    measures: str = ""
    """Measures A,B,… instead of the default ones; --list shows all."""
    all: bool = False
    """Every measure that applies."""
    list: bool = False
    """List the measures with their definitions."""
    examples: int = 1000
    """Number of a run's images to measure on."""
    batch_size: int = 250
    """Images per batch."""
    split: str = "train"
    """Split of a run's data: train or test."""
    fact: Repeated = ()
    """NAME=VALUE of split, augmentation, learning_rate, weight_decay_inside or label_smoothing; or 'unknown'."""
    learning_rate: float | None = None
    """The same as --fact learning_rate=…"""
    augmentation: str | None = None
    """The same as --fact augmentation=…"""
    bn: str = "eval"
    """Batch norm: eval or train."""
    params: str = ""
    """Names A,B,… of the parameters or modules to measure; none: all."""
    dtype: str = ""
    """float32 or float64; none: the model's own."""
    seed: int = 0
    """Seed of all random numbers."""
    resume: Path | None = None
    """Store finished parts in this folder and resume from them."""
    cross_check: bool = False
    """Also run PyHessian on the same batches and print both results."""
    line_to: str = ""
    """Also the loss along the straight line from each place to this one."""
    trust: bool = False
    """Run the Python files that a run folder's config names."""
    set: Repeated = ()
    """NAME=VALUE of a setting, such as k=10 or rhos=(0.1,)."""
