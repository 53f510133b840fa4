"""What the verbs timeline and fit can be asked: every option with its default and a line on what it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from conadv_lab.outputs import Tables

SEVERAL = ("vanilla", "disadv", "conadv", "recycled", "recycled-equal", "sam", "asyncsam")


@dataclass(frozen=True)
class TimelineOptions:
    """Step time, utilisation, effective staleness and price of a recipe on a cluster. A model, not a measurement."""

    cluster: str | None = None
    """A built-in name (see clusters) or a TOML file; None: h100, or this-machine with --calibrate."""
    recipe: str | None = None
    """imagenet-resnet50-32k and its like, or a recipe of train; None: the former, or that of the run."""
    method: tuple[str, ...] = SEVERAL
    """One or several."""
    devices: tuple[int, ...] | None = None
    """How many; one or several. None: 64, or 1 with --calibrate."""
    placement: tuple[str, ...] = ("serial",)
    """serial: pass after pass; stream: side by side those that need not wait; ranks: the attack on other devices."""
    attackers: str | None = None
    """With ranks: their number, or as a decimal fraction their share of the devices; None: a quarter."""
    staleness: int | None = None
    """τ; None: the recipe's."""
    global_batch: int | None = None
    """Images of a step; None: the recipe's."""
    joint: bool = False
    """Clean and adversarial images in one pass of twice the size, instead of one pass each."""
    ascent_share: float = 1.0
    """Share of a batch that asyncsam's ascent looks at."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Whether steps are replayed from CUDA graphs, which saves the host its launches; auto: as training decides."""
    steps: int = 200
    """Simulated steps."""
    seed: int = 0
    """Of stragglers and interruptions."""
    set: tuple[str, ...] = ()
    """Other constants, such as network.card_gbs=24 stragglers.spread=0.1 failures.preemption_hours=4, but compute's."""
    best: bool = False
    """Every placement and share of attackers of conadv (or --method asyncsam) beside its baselines, fastest first."""
    calibrate: tuple[Path, ...] = ()
    """Run folders of one model: fit its compute constants to their images per second."""
    save: Path | None = None
    """Write the cluster with all changes as a TOML file."""
    trace: Path | None = None
    """Write the effective τ of each step and worker, as .npy or .csv; needs one row."""
    files: tyro.conf.OmitArgPrefixes[Tables] = field(default_factory=Tables)


@dataclass(frozen=True)
class FitOptions:
    """Step times of MLPerf and of one H200 against predictions whose constants were fitted on the fewer of them."""

    all_rows: bool = False
    """Fit MLPerf's on every row instead, to see what the model cannot do."""
    every_choice: bool = False
    """Count from how many other choices of as many rows all come out within tolerance."""
    files: tyro.conf.OmitArgPrefixes[Tables] = field(default_factory=Tables)
