"""The staleness timeline against published step times, against SimPy, and against this machine.

    python -m benchmarks.staleness [--json FILE] [--rounds N] [--skip-machine]

Rows, with their ratio: one per published H100 or A100 line, predicted / measured, with constants fitted on at most
half of the lines; one per step of one H200, captured or eager, likewise; ``4096 devices``, the seconds to simulate
10,000 steps with stragglers in a separate process, its peak memory, and how time grows with devices × steps; the time
per device-step of ours and of the SimPy model in the tests; and step times relative to vanilla on this machine,
predicted / measured, calibrated from one run at another batch size.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch

from benchmarks.harness import Options, Row, interleaved, publish
from benchmarks.step import our_run
from conadv_lab import cli
from conadv_lab.config import Config
from conadv_lab.staleness.timeline import one_device
from conadv_lab.staleness.timeline.calibrate import compare, from_runs
from conadv_lab.staleness.timeline.cluster import load
from conadv_lab.staleness.timeline.communication import all_reduce
from conadv_lab.staleness.timeline.recursion import timeline
from conadv_lab.staleness.timeline.step_times import buckets, step_times
from conadv_lab.staleness.timeline.stragglers import factors
from conadv_lab.staleness.timeline.workload import WORKLOADS, workload_of

# The event model has one pass for all images.
RECIPE = WORKLOADS["imagenet-resnet50-32k"].replace(micro_batch=None)
DEVICES, STEPS, EVENT_STEPS = 4096, 10_000, 4
SIZES = ((1024, 10_000), (2048, 10_000), (4096, 2_500), (4096, 5_000), (4096, 10_000))
PLACES = {"4096 devices": ("disadv", "serial"), "4096 devices, a quarter attack": ("conadv", "ranks")}
CALIBRATED_AT, CHECKED_AT, CALIBRATION_STEPS = 32, 16, 12
CHILD = """
import json, resource, sys, time
from conadv_lab.staleness.timeline.simulation import one_timeline
method, placement, rounds, sizes = json.loads(sys.argv[1])
seconds = []
for devices, steps in sizes:
    for _ in range(rounds):
        start = time.perf_counter()
        one_timeline("h100", "imagenet-resnet50-32k", method, devices=devices, steps=steps, placement=placement)
        seconds.append((devices, steps, time.perf_counter() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mib": peak}))
"""


def published_rows() -> list[Row]:
    """Predicted step times beside published ones."""
    rows = []
    for one in compare().to_dict("records"):
        name = (
            f"{one['cluster']} {one['devices']} devices, {'fitted' if one['fitted'] == 'yes' else 'held out'}"
        )
        rows.append(Row(name, one["predicted_ms"], "ms", "MLPerf", one["ratio"]))
    return rows


def device_rows() -> list[Row]:
    """Predicted step times of one H200, captured and eager, beside measured ones."""
    rows = []
    for one in one_device.compare().to_dict("records"):
        fitted = "fitted" if one["fitted"] == "yes" else "held out"
        ran = f"capture {one['capture']}, beside {one['beside']}"
        name = f"h200, {one['images']} images, {one['method']}, {ran}, {fitted}"
        rows.append(Row(name, one["predicted_ms"], "ms", "measured", one["ratio"]))
    return rows


def speed_rows(rounds: int) -> list[Row]:
    """Seconds and memory of long runs, and the exponent of time in devices × steps."""
    rows = []
    for name, (method, placement) in PLACES.items():
        sizes = SIZES if placement == "serial" else SIZES[-1:]
        words = json.dumps([method, placement, rounds, sizes])
        made = subprocess.run(
            [sys.executable, "-c", CHILD, words], capture_output=True, text=True, check=True
        )
        told = json.loads(made.stdout)
        times = {
            size: median(s for devices, steps, s in told["seconds"] if (devices, steps) == size)
            for size in sizes
        }
        rows.append(Row(name, times[DEVICES, STEPS], "s"))
        rows.append(Row(f"{name}, peak memory of the process", told["peak_mib"], "MiB"))
        if len(sizes) > 1:
            cells = np.log([devices * steps for devices, steps in sizes])
            slope = float(np.polyfit(cells, np.log([times[size] for size in sizes]), 1)[0])
            rows += [Row(f"{d} devices, {s:,} steps", times[d, s], "s") for d, s in sizes[:-1]]
            rows.append(Row("exponent of time in devices × steps", slope, "1"))
    return rows


def event_rows(ours: float, rounds: int) -> list[Row]:
    """Time per device-step of the vectorised timeline and of the SimPy model; ratio: ours / SimPy's."""
    try:
        from tests.staleness.timeline.discrete_event import Job, Simulation
    except ImportError:
        print("simpy is not installed: not measured", file=sys.stderr)
        return []
    cluster = load("h100")
    own = step_times(cluster, RECIPE, "disadv", DEVICES)
    size = RECIPE.parameters * RECIPE.bytes_each
    passes = [span.end - span.start for span in own.spans]
    filled = buckets(size, cluster.network.bucket_mb).tolist()
    job = Job(
        DEVICES, EVENT_STEPS, passes, filled, lambda b: all_reduce(cluster.network, b, DEVICES), own.optimizer
    )
    drawn = np.concatenate(list(factors(cluster.stragglers, EVENT_STEPS, DEVICES, 0)))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        theirs = Simulation(job, drawn).run()
        seconds.append(time.perf_counter() - start)
    same = timeline(own, cluster.stragglers, EVENT_STEPS, 0).makespan
    if abs(same / theirs.makespan - 1) > 1e-9:
        raise RuntimeError(f"SimPy ends after {theirs.makespan} s, the timeline after {same} s")
    mine = 1e9 * ours / (DEVICES * STEPS)
    simpy = 1e9 * median(seconds) / (DEVICES * EVENT_STEPS)
    return [
        Row("device-step", mine, "ns", "SimPy", mine / simpy),
        Row("device-step of SimPy", simpy, "ns"),
        Row(
            f"SimPy, 4096 devices and 10,000 steps, from {EVENT_STEPS} steps",
            simpy * DEVICES * STEPS / 1e9,
            "s",
        ),
    ]


def machine_rows(model: str, rounds: int) -> list[Row]:
    """Step times relative to vanilla: predicted from one vanilla run at another batch size / measured."""
    methods = ("disadv", "conadv", "recycled", "recycled-equal")
    with tempfile.TemporaryDirectory() as scratch:
        first = our_run(model, "vanilla", CALIBRATED_AT, Path(scratch) / "calibration")
        first.config = first.parts.config = first.config.replace(log_every=1)
        for _ in range(CALIBRATION_STEPS):
            first.train_step()
        cluster, _ = from_runs(load("this-machine"), [Path(scratch) / "calibration" / "vanilla"])
        runs = {m: our_run(model, m, CHECKED_AT, Path(scratch)) for m in ("vanilla", *methods)}
        for run in runs.values():  # recycled methods have images to recycle only from the second step on
            run.train_step()
            run.train_step()
        times = interleaved({m: run.train_step for m, run in runs.items()}, rounds)
        workload = workload_of(Config().replace(model=model, dataset="synthetic", global_batch=CHECKED_AT))
    base = step_times(cluster, workload, "vanilla", 1).compute
    rows = [Row(f"{model} vanilla, predicted", 1e3 * base, "ms", "measured", base / times.median("vanilla"))]
    for method in methods:
        own = step_times(cluster, workload, method, 1)
        predicted, measured = own.compute / base, times.row(method, "vanilla")
        assert measured.ratio is not None
        low, high = measured.spread or (measured.ratio, measured.ratio)
        rows.append(
            Row(f"{model} {method} over vanilla, predicted", predicted, "1", "measured",
                predicted / measured.ratio, (predicted / high, predicted / low))
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class StalenessOptions(Options):
    rounds: int = 5
    skip_machine: bool = False  # Skip training on this machine.
    model: Literal["resnet18", "digits-cnn"] = "resnet18"  # Trained here.


def main() -> None:
    asked = cli.asked(StalenessOptions, None, "benchmarks.staleness", __doc__)
    torch.set_num_threads(1)
    rows = published_rows() + device_rows()
    fast = speed_rows(asked.rounds)
    rows += fast + event_rows(fast[0].value, min(asked.rounds, 3))
    if not asked.skip_machine:
        rows += machine_rows(asked.model, max(asked.rounds, 7))
    publish(rows, asked.json)


if __name__ == "__main__":
    main()
