"""The simulator as a table: one row per combination of method, placement and number of devices."""

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from conadv_lab.config import Config
from conadv_lab.mistakes import require
from conadv_lab.staleness.timeline.cluster import Cluster, load
from conadv_lab.staleness.timeline.interruptions import finish_seconds, interruptions
from conadv_lab.staleness.timeline.recursion import Timeline, timeline
from conadv_lab.staleness.timeline.step_times import METHODS, StepTimes, named, step_times
from conadv_lab.staleness.timeline.workload import Workload, workload_of

if TYPE_CHECKING:
    import pandas as pd

RUNS = 200
"""Number of simulated runs with interruptions behind ``hours`` and ``hours_p95``."""
SHARES = (1 / 16, 1 / 8, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2)
"""Fractions of attackers that `best` tries."""


def simulate(
    cluster: str | Cluster,
    recipe: str | Config | Workload,
    method: str | Sequence[str] = "conadv",
    *,
    devices: int | Sequence[int],
    placement: str | Sequence[str] = "serial",
    attackers: int | float | None = None,
    staleness: int | None = None,
    ascent_share: float = 1.0,
    capture: str = "auto",
    steps: int = 200,
    seed: int = 0,
) -> "pd.DataFrame":
    """A tidy table of step times, utilisation, effective τ and the cost of the whole recipe.

    Args:
        cluster: a built-in name, a TOML file, or a `Cluster`.
        recipe: see `workload.workload_of`; its global batch is split over the devices.
        method, devices, placement: one or several; each combination is a row. ``ranks`` is skipped for methods
            that do not support it, if others do.
        attackers: with placement ranks, their number (int) or fraction of the devices (float below 1).
        staleness: τ; None: the recipe's.
        capture: see `step_times.step_times`.
        steps: to simulate; times of the whole recipe follow from their mean.

    Returns:
        the columns of `row`.

    Raises:
        ValueError: an unknown name, or inconsistent numbers.

    >>> rows = simulate("h100", "imagenet-resnet50-32k", ["disadv", "conadv"], devices=64)
    >>> list(rows["method"]), bool((rows["step_ms"] > 0).all())
    (['disadv', 'conadv'], True)
    """
    import pandas as pd

    chosen, workload = load(cluster), workload_of(recipe)
    methods, placements, counts = _listed(method), _listed(placement), _listed(devices)
    for what, given in (("method", methods), ("placement", placements), ("devices", counts)):
        require(len(given) > 0, what, given, "at least one")
    if attackers is not None and "ranks" not in placements:
        raise ValueError(f"attackers is {attackers}; allowed with placement {', '.join(placements)}: None")
    concurrent = {name: named(name, workload).concurrent for name in methods}
    rows = []
    for name, place, count in product(methods, placements, counts):
        if place == "ranks" and not concurrent[name] and any(concurrent.values()):
            continue
        number = None if place != "ranks" else attackers_of(attackers, count)
        own = step_times(
            chosen, workload, name, count,
            placement=place, attackers=number, staleness=staleness, ascent_share=ascent_share,
            capture=capture,
        )  # fmt: skip
        rows.append(row(chosen, workload, timeline(own, chosen.stragglers, steps, seed), seed))
    return pd.DataFrame(rows)


def attackers_of(attackers: int | float | None, devices: int) -> int | None:
    """Number of attackers from a number or fraction; None stays None."""
    if attackers is None or isinstance(attackers, int):
        return attackers
    require(devices >= 2, "devices", devices, "at least 2 with placement ranks")
    return share_to_count(attackers, devices)


def row(cluster: Cluster, workload: Workload, done: Timeline, seed: int = 0) -> dict[str, Any]:
    """One line of the table.

    ``step_ms`` is the steady-state mean, ``exposed_ms`` the part that all-reduce and optimiser add to the compute
    of a device without noise; ``tau_*`` the effective τ over steps and workers; ``hours`` the whole recipe with
    failures and preemptions (mean, 95th percentile), ``device_hours`` that times the number of devices;
    ``checkpoint_every`` is in steps, None without failures.
    """
    own = done.times
    job = interruptions(cluster.failures, own.devices, done.settled)
    hours = finish_seconds(workload.steps * done.settled, job, runs=RUNS, seed=seed) / 3600
    taus = np.array(list(done.tau_counts().items()))
    return {
        "cluster": cluster.name,
        "recipe": workload.name,
        "method": own.method,
        "placement": own.placement,
        "capture": "on" if own.captured else "off",
        "devices": own.devices,
        "attackers": own.attackers,
        "global_batch": workload.global_batch,
        "images_per_device": own.images,
        "staleness": own.staleness,
        "step_ms": 1e3 * done.settled,
        "step_ms_p95": 1e3 * float(np.quantile(done.step_seconds, 0.95)),
        "compute_ms": 1e3 * own.compute,
        "reduce_ms": 1e3 * float(own.reduce.sum()),
        "exposed_ms": 1e3 * float(own.until_reduced(np.ones(1))[0] - own.compute + own.optimizer),
        "images_per_second": workload.global_batch / done.settled,
        "utilisation": done.utilisation,
        "tau_mean": float((taus[:, 0] * taus[:, 1]).sum()),
        "tau_min": int(taus[:, 0].min()),
        "tau_max": int(taus[:, 0].max()),
        "steps": workload.steps,
        "checkpoint_every": round(job.stretch / done.settled) if math.isfinite(job.stretch) else None,
        "hours": float(hours.mean()),
        "hours_p95": float(np.quantile(hours, 0.95)),
        "device_hours": float(hours.mean()) * own.devices,
        "kind": "model",
    }


def best(
    cluster: str | Cluster,
    recipe: str | Config | Workload,
    method: str = "conadv",
    *,
    devices: int,
    staleness: int | None = None,
    ascent_share: float = 1.0,
    capture: str = "auto",
    steps: int = 200,
    seed: int = 0,
) -> "pd.DataFrame":
    """All placements of the attack on this many devices, fastest first, with `simulate`'s columns.

    With ranks it tries the fractions in `SHARES`, and then every eighth between the neighbours of the fastest one.
    """
    import pandas as pd

    chosen, workload = load(cluster), workload_of(recipe)
    able = [name for name in METHODS if named(name, workload).concurrent]
    require(named(method, workload).concurrent, "method", method, ", ".join(able))

    def tried(place: str, counts: Iterable[int | None]) -> list[dict[str, Any]]:
        tried_steps = [
            step_times(
                chosen, workload, method, devices,
                placement=place, attackers=n, staleness=staleness, ascent_share=ascent_share,
                capture=capture,
            )
            for n in counts
        ]  # fmt: skip
        return [row(chosen, workload, timeline(p, chosen.stragglers, steps, seed), seed) for p in tried_steps]

    rows = tried("serial", [None]) + tried("stream", [None])
    if devices > 1:
        counts = sorted({share_to_count(share, devices) for share in SHARES})
        by_share = tried("ranks", counts)
        place = int(np.argmin([r["step_ms"] for r in by_share]))
        low, high = counts[max(0, place - 1)], counts[min(len(counts) - 1, place + 1)]
        finer = {int(n) for n in np.linspace(low, high, 9)} - set(counts)
        rows += by_share + tried("ranks", sorted(finer))
    return pd.DataFrame(rows).sort_values("step_ms", kind="stable").reset_index(drop=True)


def one_timeline(
    cluster: str | Cluster, recipe: str | Config | Workload, method: str, *, devices: int, steps: int = 200,
    seed: int = 0, **options: Any,
) -> Timeline:  # fmt: skip
    """The timeline behind one row of `simulate`, for its trace and chart; options as for `step_times.step_times`."""
    chosen = load(cluster)
    own: StepTimes = step_times(chosen, workload_of(recipe), method, devices, **options)
    return timeline(own, chosen.stragglers, steps, seed)


def share_to_count(share: float, devices: int) -> int:
    """Number of attackers from a fraction of the devices, at least one and fewer than all.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """
    require(0 < share < 1, "attacker share", share, "above 0 and below 1")
    return min(max(1, round(share * devices)), devices - 1)


def _listed(value: Any) -> list[Any]:
    """One value or several as a list."""
    return list(value) if isinstance(value, (list, tuple, range, np.ndarray)) else [value]
