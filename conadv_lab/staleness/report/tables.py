"""The rows behind the page: what-if, against images and devices, effective τ, and a simple model's prediction."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from conadv_lab.staleness.timeline.cluster import Cluster, Compute, Network
from conadv_lab.staleness.timeline.recursion import timeline
from conadv_lab.staleness.timeline.simulation import best, one_timeline, row, share_to_count
from conadv_lab.staleness.timeline.step_times import step_times
from conadv_lab.staleness.timeline.workload import Workload

STEPS = 100
"""Steps simulated per point of a figure."""
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WORKERS = 64
"""Number of devices in the figure against images per device."""
SIMPLE = {4: (1.42, 1.53), 16: (1.22, 1.45), 64: (1.07, 1.38), 400: (1.01, 1.34)}
"""A simple prediction by hand: speed-up of ConAdv over DisAdv (parallel stream, one attacker per worker)."""
SIMPLE_CLUSTER = Cluster(
    "simple",
    compute={"resnet50": Compute(3.48, 0.1434)},
    network=Network(
        node_gbs=float("inf"), card_gbs=float("inf"), model="alpha-beta", node_hop_us=0.0, network_hop_us=0.0
    ),
)
"""The assumptions behind `SIMPLE`: a straight line through all seven H100 rows, nothing else."""


def what_if(cluster: Cluster, workload: Workload, devices: int, seed: int) -> pd.DataFrame:
    """`simulation.row` for five lines (column ``line``) and each change to the cluster or recipe (``what``)."""
    half = cluster.network.card_gbs / 2
    one = workload.global_batch / devices
    enough = one / (step_times(cluster, workload, "vanilla", devices).compute * 1.5)
    changes: list[tuple[str, Cluster, Workload]] = [
        ("unchanged", cluster, workload),
        ("no stragglers", cluster.replace(stragglers={"kind": "none"}), workload),
        ("stragglers of 10 %", cluster.replace(stragglers={"kind": "lognormal", "spread": 0.1}), workload),
        (
            "exponential stragglers, 10 %",
            cluster.replace(stragglers={"kind": "exponential", "spread": 0.1}),
            workload,
        ),
        (
            "one device 1.5 times slower",
            cluster.replace(stragglers={"slow_devices": 1, "slow_factor": 1.5}),
            workload,
        ),
        (f"network cards of {half:g} GB/s", cluster.replace(network={"card_gbs": half}), workload),
        (
            "all-reduce after the backward pass, not during it",
            cluster.replace(network={"bucket_mb": 1e6}),
            workload,
        ),
        ("loader too slow for vanilla", cluster.replace(input={"images_per_second": enough}), workload),
        ("both halves in one pass", cluster, workload.replace(joint=True)),
        (
            "a quarter of the batch",
            cluster,
            workload.replace(global_batch=max(devices, workload.global_batch // 4)),
        ),
        ("τ = 4", cluster, workload.replace(staleness=4)),
        ("preempted every half hour", cluster.replace(failures={"preemption_hours": 0.5}), workload),
    ]
    return pd.DataFrame(
        [{"what": what} | one for what, c, w in changes for one in _compared(c, w, devices, seed)]
    )


def _compared(cluster: Cluster, workload: Workload, devices: int, seed: int) -> list[dict[str, Any]]:
    """Vanilla, DisAdv, recycled, and ConAdv's best by placement."""
    rows: list[dict[str, Any]] = []
    for name in ("vanilla", "disadv", "recycled"):
        done = one_timeline(cluster, workload, name, devices=devices, steps=STEPS, seed=seed)
        rows.append({"line": name} | row(cluster, workload, done, seed))
    placed = best(cluster, workload, devices=devices, steps=STEPS, seed=seed)
    for place in ("stream", "ranks"):
        top = placed[placed["placement"] == place].iloc[0].to_dict()
        rows.append({"line": place} | {str(key): value for key, value in top.items()})
    return rows


def summary(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """`what_if` with one line per change, as on the page."""
    lines: list[dict[str, Any]] = []
    for what, rows in frame.groupby("what", sort=False):
        own = {one["line"]: one for one in rows.to_dict("records")}
        top = min(own["stream"], own["ranks"], key=lambda one: float(one["step_ms"]))
        times = {str(name): one["step_ms"] for name, one in own.items()}
        more = {
            "what": what, "attackers": own["ranks"]["attackers"], "tau": top["tau_mean"],
            "speed_up": own["disadv"]["step_ms"] / top["step_ms"],
            "disadv_hours": own["disadv"]["device_hours"], "conadv_hours": top["device_hours"],
        }  # fmt: skip
        lines.append(times | more)
    return lines


def lines(cluster: Cluster, places: Sequence[tuple[Workload, int]], seed: int) -> pd.DataFrame:
    """Rows of every line of the two figures; ``images`` and ``devices`` are DisAdv's at the same x value."""
    rows: list[dict[str, Any]] = []
    for workload, devices in places:
        own = {"images": workload.global_batch / devices, "workers": devices}

        def add(
            line: str, method: str, count: int, own: dict[str, Any] = own, w: Workload = workload, **more: Any
        ) -> None:
            done = one_timeline(cluster, w, method, devices=count, steps=STEPS, seed=seed, **more)
            rows.append({"line": line} | own | row(cluster, w, done, seed))

        for method in ("vanilla", "disadv", "recycled", "recycled-equal"):
            add(method, method, devices)
        add("stream", "conadv", devices, placement="stream")
        add("spare", "conadv", 2 * devices, placement="ranks", attackers=devices)
        placed = best(cluster, workload, devices=devices, steps=STEPS, seed=seed)
        top = placed[placed["placement"] == "ranks"].iloc[0].to_dict()
        rows.append({"line": "ranks"} | own | {str(k): v for k, v in top.items()})
    return pd.DataFrame(rows)


def effective(cluster: Cluster, workload: Workload, devices: int, seed: int) -> pd.DataFrame:
    """Distribution of the effective τ with stragglers of 10 %, for several τ and fractions of attackers."""
    noisy = cluster.replace(stragglers={"kind": "lognormal", "spread": 0.1})
    rows = []
    counts = sorted({share_to_count(share, devices) for share in (1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3)})
    for tau in (2, 4, 8):
        for count in counts:
            own = step_times(
                noisy, workload, "conadv", devices, placement="ranks", attackers=count, staleness=tau
            )
            done = timeline(own, noisy.stragglers, 5 * STEPS, seed)
            about = {"line": "ranks", "tau": tau, "share": count / devices} | row(noisy, workload, done, seed)
            rows += [about | {"effective": e, "part": p} for e, p in done.tau_counts().items()]
    return pd.DataFrame(rows)


def simple(cluster: Cluster, workload: Workload) -> list[dict[str, Any]]:
    """Speed-ups of the simple model, of the simulator under the same assumptions, and of the full simulator."""
    rows: list[dict[str, Any]] = []
    if workload.model not in SIMPLE_CLUSTER.compute:
        return rows
    for images, quoted in SIMPLE.items():
        cells: list[float] = []
        for spare in (False, True):
            cells.append(quoted[spare])
            for own, joint in ((SIMPLE_CLUSTER, True), (cluster, True), (cluster, False)):
                made = workload.replace(global_batch=images * WORKERS, joint=joint, micro_batch=None)
                base = one_timeline(own, made, "disadv", devices=WORKERS, steps=STEPS).settled
                where: dict[str, Any] = {"devices": WORKERS, "placement": "stream"}
                if spare:
                    where = {"devices": 2 * WORKERS, "placement": "ranks", "attackers": WORKERS}
                cells.append(base / one_timeline(own, made, "conadv", steps=STEPS, **where).settled)
        rows.append({"images": images, "cells": cells})
    return rows
