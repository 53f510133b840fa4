"""Fits the constants: of the H100 and A100 clusters to MLPerf's step times, of any cluster to our runs.

``mlperf.csv`` has ResNet-50 step times of mlcommons/training_results_v2.1 and v3.0 (medians of five runs, MXNet), from
the logged throughput; only that of 4,216 A100 is the run's time over its steps, evaluations included. Constants are
fitted to the marked rows: the smallest, (H100: the middle) and the largest number of devices; the others are held
out. Those submissions average all gradients after the backward pass in one bucket: their configurations say "no NCCL
and BWD overlap", one group, a fusion threshold of 64 MiB.
"""

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from io import StringIO
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares, nnls

from conadv_lab.config import Config, resolved
from conadv_lab.methods import method_of
from conadv_lab.methods.base import Method
from conadv_lab.runs import RunFolder
from conadv_lab.staleness.timeline.cluster import Cluster, Compute, checked, load
from conadv_lab.staleness.timeline.step_times import step_times
from conadv_lab.staleness.timeline.stragglers import mean_slowest
from conadv_lab.staleness.timeline.workload import IMAGENET, MODELS, Workload, workload_of

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = {"h100": 0.10, "a100": 0.15}
ONE_GROUP_MB = 67.108864
WARM_UP_LINES = 1
"""Logged lines to skip: the first one includes start-up."""


def published() -> "pd.DataFrame":
    """The rows of ``mlperf.csv``."""
    import pandas as pd

    return pd.read_csv(
        StringIO((files("conadv_lab.staleness.timeline") / "mlperf.csv").read_text()), comment="#"
    )


def predicted_ms(cluster: Cluster, devices: int, global_batch: int) -> float:
    """Mean step time of vanilla ResNet-50 with all gradients in one bucket, in closed form."""
    workload = Workload("mlperf", "resnet50", IMAGENET, 1.0, global_batch, MODELS["resnet50"])
    one_group = cluster.replace(network={"bucket_mb": ONE_GROUP_MB})
    own = step_times(one_group, workload, "vanilla", devices)
    slowest = np.array([mean_slowest(cluster.stragglers, devices)])
    return 1e3 * (float(own.until_reduced(slowest)[0]) + own.optimizer)


def predictions(cluster: Cluster, rows: "pd.DataFrame") -> list[float]:
    """`predicted_ms` of each row."""
    pairs = zip(rows["devices"].tolist(), rows["global_batch"].tolist(), strict=True)
    return [predicted_ms(cluster, devices, batch) for devices, batch in pairs]


def fit(cluster: Cluster, rows: "pd.DataFrame") -> Cluster:
    """The cluster with the ``fixed_ms`` and ``image_ms`` of ResNet-50 that minimise the rows' relative error."""

    start = cluster.compute.get("resnet50", Compute(3.0, 0.15))

    def made(logs: np.ndarray) -> Cluster:
        compute = dataclasses.replace(start, fixed_ms=float(np.exp(logs[0])), image_ms=float(np.exp(logs[1])))
        return dataclasses.replace(cluster, compute={**cluster.compute, "resnet50": compute})

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.log(np.array(predictions(made(logs), rows)) / rows["step_ms"].to_numpy())

    return made(least_squares(errors, np.log([start.fixed_ms, start.image_ms]), xtol=1e-12).x)


def every_choice(cluster: str) -> tuple[int, int]:
    """(number of choices of equally many rows to fit that bring all rows within tolerance, number of choices)."""
    rows = published().query("cluster == @cluster").reset_index(drop=True)
    choices = list(combinations(range(len(rows)), int((rows["fitted"] == "yes").sum())))
    good = 0
    for choice in choices:
        made = fit(load(cluster), rows.iloc[list(choice)])
        ratios = np.array(predictions(made, rows)) / rows["step_ms"].to_numpy()
        good += bool((np.abs(ratios - 1) <= TOLERANCE[cluster]).all())
    return good, len(choices)


def compare(fitted_only: bool = True) -> "pd.DataFrame":
    """Measured and predicted step times of every published row, with constants fitted to the marked rows.

    Columns of ``mlperf.csv`` and ``predicted_ms``, ``ratio`` (predicted / measured), ``tolerance``, ``within``,
    ``fixed_ms``, ``image_ms``. ``fitted_only=False`` fits all rows instead, to show the model's limits.
    """
    import pandas as pd

    parts = []
    for name, rows in published().groupby("cluster", sort=False):
        chosen = rows[rows["fitted"] == "yes"] if fitted_only else rows
        cluster = fit(load(str(name)), chosen)
        one = cluster.of("resnet50")
        part = rows.assign(
            predicted_ms=predictions(cluster, rows), fixed_ms=one.fixed_ms, image_ms=one.image_ms
        )
        part["ratio"] = part["predicted_ms"] / part["step_ms"]
        part["tolerance"] = TOLERANCE[str(name)]
        part["within"] = (part["ratio"] - 1).abs() <= part["tolerance"]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def from_runs(cluster: Cluster, runs: Sequence[str | Path]) -> tuple[Cluster, list[dict[str, Any]]]:
    """The cluster with its model's constants fitted to run folders of one model on one device.

    Args:
        cluster: gives the attack's relative cost and, if all runs have one batch size, the ratio of ``fixed_ms`` to
            ``image_ms`` (all of it in image_ms for a new model), as one batch size cannot separate the two.
        runs: run folders of one model, with any methods and batch sizes.

    Returns:
        the cluster, and one row per run: measured and fitted step time in ms, and their ratio.

    Raises:
        ValueError: not a run folder, nothing logged, several models or ranks, or a method without a timeline.
    """
    measured = [_measured(Path(run)) for run in runs]
    models = sorted({workload.model for workload, *_ in measured})
    if len(models) != 1:
        raise ValueError(f"the runs have models {', '.join(models) or 'none'}; allowed: runs of one model")
    model = models[0]
    units = [
        [_unit(cluster, workload, method, Compute(*one), place) for one in ((1.0, 0.0), (0.0, 1.0))]
        for workload, method, place, _ in measured
    ]
    times = np.array([milliseconds for *_, milliseconds in measured])
    rows = np.array(units) / times[:, None]  # each run's relative error counts equally
    before = cluster.compute.get(model, Compute(0.0, 1.0))
    if len({(w.global_batch, w.micro_batch) for w, *_ in measured}) > 1:
        fixed, each = nnls(rows, np.ones(len(rows)))[0]
    else:
        together = rows @ np.array([before.fixed_ms, before.image_ms])
        scale = together.sum() / (together**2).sum()
        fixed, each = scale * before.fixed_ms, scale * before.image_ms
    made = Compute(float(fixed), float(each), precision=measured[0][0].precision)
    found = checked(dataclasses.replace(cluster, compute={**cluster.compute, model: made}))
    lines = [
        {"run": str(run), "method": method.name, "global_batch": workload.global_batch, "measured_ms": milliseconds,
         "fitted_ms": fixed * unit[0] + each * unit[1],
         "ratio": (fixed * unit[0] + each * unit[1]) / milliseconds}
        for run, (workload, method, _, milliseconds), unit in zip(runs, measured, units, strict=True)
    ]  # fmt: skip
    return found, lines


def _unit(cluster: Cluster, workload: Workload, method: Method, one: Compute, placement: str) -> float:
    """Milliseconds of a step if a pass costs ``one``; linear in it."""
    own = dataclasses.replace(cluster, compute={workload.model: one})
    made = step_times(own, workload, method, 1, placement=placement)
    return 1e3 * (made.compute + made.optimizer)


def _measured(run: Path) -> tuple[Workload, Method, str, float]:
    folder = RunFolder(run)
    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder")
    config: Config = resolved(folder.config())
    method = method_of(config)
    ranks = folder.manifest().get("ranks", 1)
    if ranks != 1:  # its steps include waiting and all-reduces, which are not constants of a pass
        raise ValueError(f"{run} ran on {ranks} ranks; allowed: runs on one device")
    lines = [line for line in folder.metrics() if "images_per_second" in line]
    rates = [line["images_per_second"] for line in lines[WARM_UP_LINES:]] or [
        line["images_per_second"] for line in lines
    ]
    if not rates or not all(np.isfinite(rates)) or min(rates) <= 0:
        raise ValueError(f"{run} has logged no images_per_second to calibrate with")
    workload = workload_of(config)
    # The loop counts the images that a step takes from the stream.
    new = workload.global_batch * method.new_fraction
    return workload, method, config.method.placement, 1e3 * new / median(rates)
