"""Real training with stale attacks: what τ does to accuracy, sharpness and the attack itself.

``python -m conadv_lab.staleness dynamics [RECIPE | quadratic] [--taus 0 1 4 16] [--field value …]``
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.config import Config
from conadv_lab.mistakes import require
from conadv_lab.recipes import digits
from conadv_lab.staleness.draws import Draw, read_trace
from conadv_lab.staleness.frame import print_table, tidy
from conadv_lab.staleness.outputs import Outputs

if TYPE_CHECKING:
    import pandas as pd

USAGE = """usage: python -m conadv_lab.staleness dynamics [RECIPE] [--taus T ...] [--draw KIND] [--field value ...]
       python -m conadv_lab.staleness dynamics quadratic [--taus T ...] [--lr LR] ...
       python -m conadv_lab.staleness dynamics RECIPE --help     every option, with its default

RECIPE is a recipe's name or path/to/file.py:function; without one, digits-conadv with 16 epochs.
Exit status: 0 done, 2 a mistake in what was asked, 1 a failure.
"""
PROBE_EVERY = 10
"""Steps between two comparisons of stale and fresh attacks, where a recipe has none."""


@dataclass(frozen=True)
class Options:
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
    json: Path | None = None
    """Write the rows of the tidy frame."""
    csv: Path | None = None
    """Write them as CSV."""
    figure: Path | None = None
    """Draw them: .png, .pdf or .svg."""

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


def small() -> Config:
    """Digits, ConAdv at batch 256 for 16 epochs: what the command studies unasked, in under a minute."""
    return digits.conadv().replace(epochs=16, probe_every=4)


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    words = list(words)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    try:
        frame, outputs = _quadratic(words) if name == "quadratic" else _training(name, words)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    from conadv_lab.staleness import dynamics_figures

    print_table(frame)
    outputs.write(frame, lambda: dynamics_figures.page(frame))
    return 0


def _quadratic(words: list[str]) -> "tuple[pd.DataFrame, Outputs]":
    import tyro

    asked = tyro.cli(
        QuadraticOptions, args=words, prog="conadv_lab.staleness dynamics quadratic",
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    outputs = Outputs(asked.json, asked.csv, asked.figure)
    from conadv_lab.staleness.quadratic_dynamics import study

    return study(asked.draws(), asked), outputs


def _training(name: str, words: list[str]) -> "tuple[pd.DataFrame, Outputs]":
    from conadv_lab.cli import parse_config
    from conadv_lab.recipes import find

    recipe = _probed(find(name)) if name else small
    prog = f"conadv_lab.staleness dynamics {name or 'digits-conadv'}"
    config, asked = parse_config(recipe, words, prog=prog, options=RunOptions())
    outputs = Outputs(asked.json, asked.csv, asked.figure)
    return study(
        config, asked.draws(), seeds=asked.seeds, curvature_images=asked.curvature_images,
        problem=name or "digits-conadv", progress=True,
    ), outputs  # fmt: skip


def _probed(recipe: Callable[[], Config]) -> Callable[[], Config]:
    """The recipe, stale and fresh attacks compared every so often: that is what is studied here."""

    def probed() -> Config:
        config = recipe()
        return config.replace(probe_every=config.training.probe_every or PROBE_EVERY)

    probed.__doc__ = recipe.__doc__
    return probed


def study(
    config: Config,
    draws: Sequence[Draw],
    *,
    seeds: int = 1,
    curvature_images: int = 256,
    problem: str = "",
    progress: bool = False,
) -> "pd.DataFrame":
    """Train once for every draw of τ and every seed; a tidy frame with a row a value.

    Args:
        config: of ConAdv; its staleness is replaced. Where several workers share a batch and it has no micro-batch,
            each worker's share becomes one. ``probe_every`` says how often stale and fresh attacks are compared.
        seeds: this many from the config's own on.
        curvature_images: training images that the top eigenvalue is measured on; 0 for none.
        problem: what the column of that name holds.
        progress: a line a run on the standard error.

    Returns:
        The columns of `frame.tidy`. Measures of a probe: ``sign_agreement``, ``gain_ratio``, ``distance`` (see
        `probes.probe`). Measures of a run: ``test_accuracy`` in %, ``train_test_gap``, ``train_loss``,
        ``top_eigenvalue`` of the training loss, ``lr_times_eigenvalue``; or in place of them ``diverged_at``, the
        step whose loss was NaN or infinite.

    Raises:
        ValueError: another method than ConAdv, a trace too short, fewer groups than workers; nothing is trained.
    """
    from conadv_lab.staleness.stale_training import plan, run

    require(curvature_images >= 0, "curvature_images", curvature_images, "a whole number of at least 0")
    jobs = plan(config, draws, seeds)
    rows: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, 1):
        about = {
            "problem": problem, "draw": job.draw.kind, "tau": job.draw.mean, "workers": job.draw.columns,
            "seed": job.config.training.seed, "lr": job.config.optimization.lr,
        }  # fmt: skip
        rows += [about | row for row in run(job, curvature_images)]
        if progress:
            print(f"run {number} of {len(jobs)}: {job}", file=sys.stderr, flush=True)
    return tidy(rows)
