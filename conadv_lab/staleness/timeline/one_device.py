"""Measured steps of one H200, captured and eager, against the predictions of `passes` with five fitted constants.

They are fitted one after another, in relative error, to steps with sequential passes: a and c to captured vanilla
steps, the attack's fractions of both to captured DisAdv steps, the launch time to eager vanilla steps. The number of
launches per pass is counted. Held out are all steps with parallel passes, ConAdv's and recycled's, and all eager steps
but vanilla's.
"""

import dataclasses
from importlib.resources import files
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares

from conadv_lab.staleness.timeline.cluster import Cluster, load
from conadv_lab.staleness.timeline.passes import Passes
from conadv_lab.staleness.timeline.step_times import named
from conadv_lab.staleness.timeline.workload import workload_of

if TYPE_CHECKING:
    import pandas as pd

CLUSTER, RECIPE, FILE = "h200", "imagenet-resnet50-1k", "h200.csv"
TOLERANCE = 0.15
REPLAYED = {"on": "all", "off": "none", "attack": "attack"}


def measured() -> "pd.DataFrame":
    """The rows of ``h200.csv`` made with this package, or with its steps captured by hand."""
    import pandas as pd

    text = (files("conadv_lab.staleness.timeline") / FILE).read_text()
    rows = pd.read_csv(StringIO(text), comment="#")
    return rows[rows["capture"] != "plain"].reset_index(drop=True)


def predicted_ms(cluster: Cluster, row: Any) -> float:
    """Milliseconds of a row's step."""
    workload = workload_of(RECIPE).replace(global_batch=int(row.images), micro_batch=None)
    step = Passes(cluster, workload, float(row.images))
    step.add_step(named(row.method, workload), row.beside, REPLAYED[row.capture])
    return 1e3 * step.end


def compare(cluster: Cluster | None = None) -> "pd.DataFrame":
    """Every row with ``predicted_ms``, ``ratio`` (predicted / measured) and ``within`` the tolerance."""
    rows = measured()
    chosen = load(CLUSTER) if cluster is None else cluster
    rows["predicted_ms"] = [predicted_ms(chosen, row) for row in rows.itertuples()]
    rows["ratio"] = rows["predicted_ms"] / rows["step_ms"]
    rows["within"] = (rows["ratio"] - 1).abs() <= TOLERANCE
    return rows


def fit(cluster: Cluster) -> Cluster:
    """The cluster with the five constants fitted to the marked rows, the others unchanged."""
    rows = measured()
    rows = rows[rows["fitted"] == "yes"]
    vanilla, captured = rows["method"] == "vanilla", rows["capture"] == "on"
    for section, keys, own in (
        ("compute", ("fixed_ms", "image_ms"), rows[vanilla & captured]),
        ("attack", ("fixed_share", "image_share"), rows[~vanilla & captured]),
        ("host", ("launch_us",), rows[~captured]),
    ):
        cluster = _fitted(cluster, section, keys, own)
    return cluster


def _fitted(cluster: Cluster, section: str, keys: tuple[str, ...], rows: "pd.DataFrame") -> Cluster:
    measured_ms = rows["step_ms"].to_numpy(float)

    def made(logs: np.ndarray) -> Cluster:
        values = dict(zip(keys, np.exp(logs).tolist(), strict=True))
        if section != "compute":
            return cluster.replace(**{section: values})
        compute = dataclasses.replace(cluster.of("resnet50"), **values)
        return dataclasses.replace(cluster, compute={**cluster.compute, "resnet50": compute})

    def errors(logs: np.ndarray) -> np.ndarray:
        predicted = np.array([predicted_ms(made(logs), row) for row in rows.itertuples()])
        return np.log(predicted / measured_ms)

    start = cluster.of("resnet50") if section == "compute" else getattr(cluster, section)
    return made(least_squares(errors, np.log([getattr(start, key) for key in keys]), xtol=1e-12).x)
