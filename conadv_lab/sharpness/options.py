"""What ``python -m conadv_lab.sharpness`` can be asked: every option with its default and a line on what it is."""

from dataclasses import dataclass
from pathlib import Path

import tyro

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class SharpnessOptions:
    """What is measured, on what, and where it is written."""

    places: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure, each a run folder, a checkpoint folder or path/to/file.py:function; several are compared."""
    json: Path | None = None
    """Write the numbers and their conditions."""
    html: Path | None = None
    """Write one self-contained page."""
    csv: Path | None = None
    """Write one row per number."""
    figures: Path | None = None
    """Write the figures into this folder as PNG and PDF."""
    cross_check: bool = False
    """Run PyHessian on the same batches, print both."""
    measures: str = ""
    """Measure these, as A,B,…, instead of the default ones; --list shows all."""
    also: str = ""
    """Measure these too, such as density,sam_worst."""
    all: bool = False
    """Every measure that applies."""
    list: bool = False
    """List the measures with their definitions."""
    examples: int = 1000
    """Images of a run to measure on."""
    batch_size: int = 250
    """Images per batch."""
    split: str = "train"
    """Split of a run's data: train or test."""
    trust: bool = False
    """Run the Python files that a run folder's config names."""
    params: str = ""
    """Parameters or modules, as A,B,…; none: all."""
    bn: str = "eval"
    """Batch norm: eval or train."""
    dtype: str = ""
    """float32 or float64; none: the model's own."""
    line_to: str = ""
    """Also the loss along the straight line from each place to this one."""
    seed: int = 0
    """Seed of everything random."""
    resume: Path | None = None
    """Keep finished parts in this folder and continue from them."""
    learning_rate: float | None = None
    """The same as --fact learning_rate=…"""
    augmentation: str | None = None
    """The same as --fact augmentation=…"""
    fact: Repeated = ()
    """NAME=VALUE, what cannot be inferred: split, augmentation, learning_rate, weight_decay_inside, label_smoothing;
    reports need all of them; 'unknown' is accepted."""
    set: Repeated = ()
    """NAME=VALUE, a setting, such as k=10 or rhos=(0.1,)."""
