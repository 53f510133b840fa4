"""What ``python -m conadv_lab.staleness dynamics`` can be asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conadv_lab.mistakes import require
from conadv_lab.outputs import Outputs
from conadv_lab.staleness.draws import Draw, read_trace


@dataclass(frozen=True)
class Options(Outputs):
    """Of this command"""

    draw: Literal["constant", "geometric", "poisson", "per-worker"] = "constant"
    """How τ is drawn; per-worker gives each worker one of --taus for good."""
    taus: tuple[float, ...] = (0, 1, 4, 16)
    """Constants, or means of the distribution, one study each; they replace the recipe's staleness."""
    trace: Path | None = None
    """A .csv or .npy file of (steps, workers) of τ, in place of draw, taus and stale-workers."""
    stale_workers: int = 1
    """Workers that share a global batch, each with its own τ."""
    seeds: int = 1
    """Runs of each draw: this many seeds from --seed on."""

    def draws(self) -> list[Draw]:
        """The draws that are asked for.

        Raises:
            ValueError: a number out of range, a trace that cannot be used.
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
                f"stale-workers is {self.stale_workers}; allowed: {own.columns}, as many as have a τ"
            )
        return [own]


@dataclass(frozen=True)
class RunOptions(Options):
    """Of this command"""

    curvature_images: int = 256
    """Training images that the top eigenvalue is measured on; 0 for none."""


@dataclass(frozen=True)
class QuadraticOptions(Options):
    """Training on a quadratic min–max problem with known constants."""

    lr: float = 0.02
    """Step size."""
    steps: int = 1000
    """Length of a run."""
    probe_every: int = 10
    """Steps between two comparisons of stale and fresh attacks."""
    solver: Literal["exact", "ascent", "sign"] = "exact"
    """The attack: a maximiser, three ascent steps, or one sign step."""
    noise: float = 0.3
    """s, standard deviation of the examples."""
    replicas: int = 64
    """Runs side by side that a figure is the mean of."""
    seed: int = 0
    """Of the problem, the noise and the draws."""
