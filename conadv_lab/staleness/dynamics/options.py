"""Options of ``python -m conadv_lab.staleness dynamics``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from conadv_lab.cli import OUTPUT_FILES
from conadv_lab.mistakes import require
from conadv_lab.outputs import Outputs
from conadv_lab.staleness.draws import Draw, read_trace


@dataclass(frozen=True)
class Options:
    """Staleness, seeds and output files."""

    draw: Literal["constant", "geometric", "poisson", "per-worker"] = "constant"
    """Distribution of τ; per-worker gives each worker one fixed value of --taus."""
    taus: tuple[float, ...] = (0, 1, 4, 16)
    """Constant values or means of τ, one study each; they replace the recipe's staleness."""
    trace: Path | None = None
    """A .csv or .npy file with τ as (steps, workers), instead of draw, taus and stale-workers."""
    stale_workers: int = 1
    """Number of workers that share a global batch, each with its own τ."""
    seeds: int = 1
    """Number of runs per distribution, with seeds from --seed on."""
    files: Annotated[Outputs, OUTPUT_FILES] = field(default_factory=Outputs)

    def draws(self) -> list[Draw]:
        """The requested distributions of τ.

        Raises:
            ValueError: a number out of range, or an unusable trace.
        """
        require(self.seeds >= 1, "seeds", self.seeds, "a whole number of at least 1")
        require(len(self.taus) > 0, "taus", self.taus, "at least one")
        if self.trace is None and self.draw != "per-worker":
            return [Draw(self.draw, tau, self.stale_workers) for tau in self.taus]
        if self.trace is not None:
            own = Draw("trace", trace=read_trace(self.trace))
        else:
            own = Draw("per-worker", of_workers=tuple(self.taus))
        if self.stale_workers not in (1, own.columns):
            raise ValueError(
                f"stale-workers is {self.stale_workers}; allowed: {own.columns}, the number of workers with a τ"
            )
        return [own]


@dataclass(frozen=True)
class RunOptions(Options):
    """Staleness, seeds and output files."""

    curvature_images: int = 256
    """Number of training images for measuring the top eigenvalue; 0: do not measure it."""


@dataclass(frozen=True)
class QuadraticOptions(Options):
    """Training on a quadratic min–max problem with known constants."""

    lr: float = 0.02
    """Step size."""
    steps: int = 1000
    """Steps per run."""
    probe_every: int = 10
    """Steps between comparisons of stale and fresh attacks."""
    solver: Literal["exact", "ascent", "sign"] = "exact"
    """The attack: exact maximiser, three ascent steps, or one sign step."""
    noise: float = 0.3
    """s, standard deviation of the examples."""
    replicas: int = 64
    """Number of parallel runs to average over."""
    seed: int = 0
    """Seed of the problem, the noise and τ."""
