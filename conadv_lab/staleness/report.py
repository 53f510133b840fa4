"""The simulator's answers as one self-contained page, with the rows behind it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

from conadv_lab.config import Config
from conadv_lab.mistakes import require
from conadv_lab.sharpness.figures import save, svg
from conadv_lab.staleness import calibrate, figures
from conadv_lab.staleness.cluster import Cluster, Compute, Network, load
from conadv_lab.staleness.plan import plan
from conadv_lab.staleness.simulation import best, one_timeline, row, share_to_count
from conadv_lab.staleness.timeline import timeline
from conadv_lab.staleness.workload import Workload, workload_of

STEPS = 100
"""Simulated for each point of a figure."""
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WORKERS = 64
"""Devices of the figure against images per device."""
SIMPLE = {4: (1.42, 1.53), 16: (1.22, 1.45), 64: (1.07, 1.38), 400: (1.01, 1.34)}
"""A first prediction, by hand: speed-up of ConAdv over DisAdv (beside the step, with a spare device a worker)."""
SIMPLE_CLUSTER = Cluster(
    "simple",
    compute={"resnet50": Compute(3.48, 0.1434)},
    network=Network(
        node_gbs=float("inf"), card_gbs=float("inf"), model="alpha-beta", node_hop_us=0.0, network_hop_us=0.0
    ),
)
"""The assumptions behind `SIMPLE`: a straight line through all seven H100 rows, nothing else."""
DYNAMICS = (
    ("test_accuracy", "test accuracy (%)"),
    ("top_eigenvalue", "top Hessian eigenvalue λ"),
    ("sign_agreement", "sign agreement, stale and fresh"),
    ("gain_ratio", "loss gain, stale / fresh"),
)


@dataclass(frozen=True)
class Picture:
    """A figure of the page: ``part`` is where it stands, ``name`` its file name."""

    part: str
    name: str
    title: str
    text: str
    figure: Figure


@dataclass(frozen=True)
class Made:
    """The page, all rows behind it (column ``table`` says of which part), and its figures."""

    html: str
    rows: pd.DataFrame
    pictures: tuple[Picture, ...]


def build(
    cluster: str | Cluster,
    recipe: str | Config | Workload,
    *,
    devices: int = 512,
    seed: int = 0,
    dynamics: pd.DataFrame | None = None,
) -> Made:
    """Simulate everything and make the page.

    Args:
        dynamics: columns ``tau``, ``measure``, ``value``; adds accuracy and sharpness against τ.

    Raises:
        ValueError: as for `simulation.simulate`; fewer than two devices.
    """
    require(devices >= 2, "devices", devices, "a whole number of at least 2")
    chosen, workload = load(cluster), workload_of(recipe)
    what_if = _what_if(chosen, workload, devices, seed)
    by_images = _lines(chosen, [(workload.replace(global_batch=b * WORKERS), WORKERS) for b in IMAGES], seed)
    first = 3 if workload.global_batch >= 64 else 0
    counts = [2**n for n in range(first, 13) if 2**n <= workload.global_batch]
    by_devices = _lines(chosen, [(workload, n) for n in counts], seed)
    taus = _effective(chosen, workload, devices, seed)
    fit = calibrate.compare()
    pictures = [*_pictures(chosen, workload, by_images, by_devices, taus, fit, seed), *_dynamics(dynamics)]
    template = (files("conadv_lab.staleness") / "report.html").read_text()
    html = Environment(autoescape=True).from_string(template).render(
        cluster=chosen.name, recipe=workload.name, about=chosen.about, compute=asdict(chosen.of(workload.model)),
        attack=asdict(chosen.attack), batch=workload.global_batch, staleness=workload.staleness,
        steps=workload.steps, devices=devices, what_if=what_if, simple=_simple(chosen, workload),
        fit=fit.to_dict("records"), has_dynamics=any(p.part == "dynamics" for p in pictures),
        pictures=[{"part": p.part, "title": p.title, "text": p.text, "svg": svg(p.figure)} for p in pictures],
    )  # fmt: skip
    tables = {"images per device": by_images, "devices": by_devices}
    rows = pd.concat([frame.assign(table=name) for name, frame in tables.items()], ignore_index=True)
    return Made(html, rows, tuple(pictures))


def save_figures(made: Made, folder: Path) -> None:
    """Each figure as PNG and PDF."""
    for picture in made.pictures:
        save(picture.figure, folder, picture.name)


def read_rows(path: Path | None) -> pd.DataFrame | None:
    """Rows of the dynamics from ``.csv`` or ``.json`` ({"rows": […]}); None for None.

    Raises:
        ValueError: no such file, another kind, or columns that are missing.
    """
    if path is None:
        return None
    if not path.is_file() or path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path} is no table; allowed: a .csv or .json file of the dynamics")
    try:
        frame = (
            pd.read_csv(path) if path.suffix == ".csv" else pd.DataFrame(json.loads(path.read_text())["rows"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of the dynamics: {type(error).__name__}: {error}") from None
    missing = [name for name in ("tau", "measure", "value") if name not in frame]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    return frame


def _what_if(cluster: Cluster, workload: Workload, devices: int, seed: int) -> list[dict[str, Any]]:
    """A row a change to the cluster or recipe."""
    half = cluster.network.card_gbs / 2
    one = workload.global_batch / devices
    enough = one / (plan(cluster, workload, "vanilla", devices).compute * 1.5)
    changes: list[tuple[str, Cluster, Workload]] = [
        ("as it is", cluster, workload),
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
        ("all-reduce after backward, not beside it", cluster.replace(network={"bucket_mb": 1e6}), workload),
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
    return [{"what": what} | _compared(c, w, devices, seed) for what, c, w in changes]


def _compared(cluster: Cluster, workload: Workload, devices: int, seed: int) -> dict[str, Any]:
    placed = best(cluster, workload, devices=devices, steps=STEPS, seed=seed)
    fastest = {str(name): own.iloc[0] for name, own in placed.groupby("placement")}
    others = {
        name: row(
            cluster,
            workload,
            one_timeline(cluster, workload, name, devices=devices, steps=STEPS, seed=seed),
            seed,
        )
        for name in ("vanilla", "disadv", "recycled")
    }
    top = min((fastest["stream"], fastest["ranks"]), key=lambda one: one["step_ms"])
    times = {name: one["step_ms"] for name, one in others.items()}
    times |= {name: float(one["step_ms"]) for name, one in fastest.items()}
    return times | {
        "attackers": int(fastest["ranks"]["attackers"]),
        "tau": top["tau_mean"],
        "speed_up": others["disadv"]["step_ms"] / top["step_ms"],
        "disadv_hours": others["disadv"]["device_hours"],
        "conadv_hours": top["device_hours"],
    }


def _lines(cluster: Cluster, places: Sequence[tuple[Workload, int]], seed: int) -> pd.DataFrame:
    """Rows of every line of the two figures; ``images`` and ``devices`` are those of DisAdv at the same place."""
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


def _effective(cluster: Cluster, workload: Workload, devices: int, seed: int) -> pd.DataFrame:
    """Distribution of the effective τ with stragglers of 10 %, for some τ and shares of attackers."""
    noisy = cluster.replace(stragglers={"kind": "lognormal", "spread": 0.1})
    rows = []
    for tau in (2, 4, 8):
        for share in (1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3):
            count = share_to_count(share, devices)
            own = plan(noisy, workload, "conadv", devices, placement="ranks", attackers=count, staleness=tau)
            counts = timeline(own, noisy.stragglers, 5 * STEPS, seed).tau_counts()
            rows += [{"tau": tau, "share": share, "effective": e, "part": p} for e, p in counts.items()]
    return pd.DataFrame(rows)


def _simple(cluster: Cluster, workload: Workload) -> list[dict[str, Any]]:
    """Speed-ups of the simple model, of this one with the same assumptions, and of this one as it is."""
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


def _pictures(
    cluster: Cluster, workload: Workload, by_images: pd.DataFrame, by_devices: pd.DataFrame, taus: pd.DataFrame,
    fit: pd.DataFrame, seed: int,
) -> list[Picture]:  # fmt: skip
    few = workload.replace(global_batch=16 * 8)
    noisy = cluster.replace(stragglers={"kind": "lognormal", "spread": 0.05})
    named = [
        (title, one_timeline(noisy, few, method, devices=8, steps=8, seed=seed, **options))
        for title, method, options in (
            ("DisAdv: the attack first, then the step", "disadv", {}),
            (
                "ConAdv, stream: the attack of the step after beside the step",
                "conadv",
                {"placement": "stream"},
            ),
            (
                "ConAdv, ranks: 2 of 8 devices attack the step after",
                "conadv",
                {"placement": "ranks", "attackers": 2},
            ),
        )
    ]
    seen = "8 devices, 128 images a step, stragglers of 5 %. Lines: all weights are updated."
    images = f"{WORKERS} workers; the global batch grows with the images."
    counts = f"Global batch {workload.global_batch:,}, shared by the devices."
    stale = (
        "Attackers take the newest weights that they have when they begin. Where they are too few, steps wait for "
        "them, and their weights are younger than τ allows. Stragglers of 10 %."
    )
    band = "The band is the tolerance, 10 % and 15 %."
    draw = figures.step_and_speed_up
    return [
        Picture("steps", "gantt", "A few steps by device", seen, figures.gantt(named)),
        Picture(
            "steps",
            "images",
            "Against images per device",
            images,
            draw(by_images, "images", "images per device"),
        ),
        Picture(
            "steps",
            "devices",
            "Against the number of devices",
            counts,
            draw(by_devices, "workers", "devices"),
        ),
        Picture("steps", "tau", "How stale is it really?", stale, figures.effective_tau(taus)),
        Picture("fit", "fit", "Residuals of the fit", band, figures.residuals(fit)),
    ]


def _dynamics(frame: pd.DataFrame | None) -> list[Picture]:
    if frame is None:
        return []
    whole = frame[frame["phase"] == "whole"] if "phase" in frame else frame
    found: list[Picture] = []
    for name, source, title in (
        ("dynamics", whole, "Accuracy and sharpness against τ"),
        ("probes", frame, "Stale beside fresh attacks against τ"),
    ):
        wanted = DYNAMICS[:2] if name == "dynamics" else DYNAMICS[2:]
        measures = [pair for pair in wanted if pair[0] in set(source["measure"])]
        if measures:
            text = "Measured in training runs; means and standard deviations."
            found.append(Picture("dynamics", name, title, text, figures.against_tau(source, measures)))
    return found
