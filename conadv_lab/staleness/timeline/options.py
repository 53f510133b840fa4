"""Options of the verbs timeline and fit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from conadv_lab.cli import OUTPUT_FILES
from conadv_lab.outputs import Tables

SEVERAL = ("vanilla", "disadv", "conadv", "recycled", "recycled-equal", "sam", "asyncsam")


@dataclass(frozen=True)
class TimelineOptions:
    """Step time, utilisation, effective staleness and cost of a recipe on a cluster. A model, not a measurement."""

    cluster: str | None = None
    """Built-in cluster name (see clusters) or TOML file; None: h100, or this-machine with --calibrate."""
    recipe: str | None = None
    """A workload such as imagenet-resnet50-32k, or a recipe of train; None: that workload, or the calibration run's."""
    method: tuple[str, ...] = SEVERAL
    """One or several methods."""
    devices: tuple[int, ...] | None = None
    """One or several numbers of devices; None: 64, or 1 with --calibrate."""
    placement: tuple[str, ...] = ("serial",)
    """serial: passes in sequence; stream: independent passes in parallel; ranks: the attack on other devices."""
    attackers: str | None = None
    """With ranks: number of attackers, or their decimal fraction of the devices; None: a quarter."""
    staleness: int | None = None
    """τ; None: the recipe's."""
    global_batch: int | None = None
    """Images per step; None: the recipe's."""
    joint: bool = False
    """Clean and adversarial images in one pass of twice the size, instead of separate passes."""
    ascent_share: float = 1.0
    """Fraction of a batch that asyncsam's ascent uses."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay steps from CUDA graphs, which avoids launches by the host; auto: as in training."""
    steps: int = 200
    """Steps to simulate."""
    seed: int = 0
    """Seed of stragglers and interruptions."""
    set: tuple[str, ...] = ()
    """Override constants except compute's, such as network.card_gbs=24 stragglers.spread=0.1."""
    best: bool = False
    """Try every placement and fraction of attackers of conadv (or --method asyncsam); fastest first, with baselines."""
    calibrate: tuple[Path, ...] = ()
    """Fit compute constants to the images per second of these run folders, all of one model."""
    save: Path | None = None
    """Write the cluster, with all changes, as a TOML file."""
    trace: Path | None = None
    """Write the effective τ of each step and worker, as .npy or .csv; needs a single row."""
    files: Annotated[Tables, OUTPUT_FILES] = field(default_factory=Tables)


@dataclass(frozen=True)
class FitOptions:
    """Compare step times of MLPerf and of one H200 with predictions fitted to a minority of them."""

    all_rows: bool = False
    """Fit all MLPerf rows instead, to show the model's limits."""
    every_choice: bool = False
    """Count how many other choices of equally many rows bring all rows within tolerance."""
    files: Annotated[Tables, OUTPUT_FILES] = field(default_factory=Tables)
