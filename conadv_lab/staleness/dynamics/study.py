"""Real training with stale attacks: the effect of τ on accuracy, sharpness and the attack itself."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conadv_lab.config import Config
from conadv_lab.mistakes import require
from conadv_lab.staleness.draws import Draw
from conadv_lab.staleness.dynamics.frame import tidy

if TYPE_CHECKING:
    import pandas as pd


def study(
    config: Config,
    draws: Sequence[Draw],
    *,
    seeds: int = 1,
    curvature_images: int = 256,
    problem: str = "",
    progress: bool = False,
) -> "pd.DataFrame":
    """Train once for every distribution of τ and every seed; returns a tidy frame with one row per value.

    Args:
        config: of ConAdv; its staleness is replaced. If several workers share a batch and it has no micro-batch,
            each worker's share becomes one. ``probe_every`` sets how often stale and fresh attacks are compared.
        seeds: number of seeds, starting with the config's.
        curvature_images: number of training images for the top eigenvalue; 0: do not measure it.
        problem: value of the column of that name.
        progress: print one line per run to standard error.

    Returns:
        The columns of `frame.tidy`. Measures of a probe: ``sign_agreement``, ``gain_ratio``, ``distance`` (see
        `probes.probe`). Measures of a run: ``test_accuracy`` in %, ``train_test_gap``, ``train_loss``,
        ``top_eigenvalue`` of the training loss, ``lr_times_eigenvalue``; or instead ``diverged_at``, the
        step whose loss was NaN or infinite.

    Raises:
        ValueError: a method other than ConAdv, a trace that is too short, fewer micro-batches than workers; raised
            before training.
    """
    from conadv_lab.staleness.dynamics.stale_training import jobs_of, run

    require(curvature_images >= 0, "curvature_images", curvature_images, "a whole number of at least 0")
    jobs = jobs_of(config, draws, seeds)
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
