"""Real training with stale attacks: what τ does to accuracy, sharpness and the attack itself."""

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
