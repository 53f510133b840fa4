"""Options of ``python -m conadv_lab.sharpness``."""

from dataclasses import dataclass
from pathlib import Path

import tyro

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class SharpnessOptions:
    """What to measure, on which data, and where to write it."""

    places: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, checkpoint folders or path/to/file.py:function; several are compared."""
    json: Path | None = None
    """Write the numbers and their conditions."""
    html: Path | None = None
    """Write one self-contained page."""
    csv: Path | None = None
    """Write one row per number."""
    figures: Path | None = None
    """Write the figures into this folder as PNG and PDF."""
    cross_check: bool = False
    """Also run PyHessian on the same batches and print both results."""
    measures: str = ""
    """Measure A,B,… instead of the default measures; --list shows all."""
    also: str = ""
    """Additional measures, such as density,sam_worst."""
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
    trust: bool = False
    """Run the Python files that a run folder's config names."""
    params: str = ""
    """Names A,B,… of parameters or modules; none: all."""
    bn: str = "eval"
    """Batch norm: eval or train."""
    dtype: str = ""
    """float32 or float64; none: the model's own."""
    line_to: str = ""
    """Also the loss along the straight line from each place to this one."""
    seed: int = 0
    """Seed of all random numbers."""
    resume: Path | None = None
    """Store finished parts in this folder and resume from them."""
    learning_rate: float | None = None
    """The same as --fact learning_rate=…"""
    augmentation: str | None = None
    """The same as --fact augmentation=…"""
    fact: Repeated = ()
    """NAME=VALUE for reports: split, augmentation, learning_rate, weight_decay_inside, label_smoothing; or unknown."""
    set: Repeated = ()
    """NAME=VALUE, a setting, such as k=10 or rhos=(0.1,)."""
