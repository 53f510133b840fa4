"""The simulator's results as one self-contained page, with the rows behind it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from conadv_lab.config import Config
from conadv_lab.mistakes import require
from conadv_lab.pages import neutral, render, save, svg
from conadv_lab.staleness.dynamics import figures as dynamics_figures
from conadv_lab.staleness.dynamics.frame import COLUMNS, WHOLE
from conadv_lab.staleness.report import figures
from conadv_lab.staleness.report import tables as made_of
from conadv_lab.staleness.report.tables import IMAGES, WORKERS
from conadv_lab.staleness.timeline import calibrate
from conadv_lab.staleness.timeline.cluster import Cluster, load
from conadv_lab.staleness.timeline.simulation import one_timeline
from conadv_lab.staleness.timeline.step_times import named
from conadv_lab.staleness.timeline.workload import Workload, workload_of


@dataclass(frozen=True)
class Picture:
    """A figure of the page: ``part`` is its section, ``name`` its file name."""

    part: str
    name: str
    title: str
    text: str
    figure: Figure


@dataclass(frozen=True)
class Made:
    """The page, the predicted rows behind it (column ``table`` names the section), and its figures."""

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
    """Run all simulations and build the page.

    Args:
        dynamics: from `dynamics.study`; adds accuracy and sharpness against τ.

    Raises:
        ValueError: as for `simulation.simulate`; fewer than two devices.
    """
    require(devices >= 2, "devices", devices, "a whole number of at least 2")
    chosen, workload = load(cluster), workload_of(recipe)
    what_if = made_of.what_if(chosen, workload, devices, seed)
    batches = [(workload.replace(global_batch=images * WORKERS), WORKERS) for images in IMAGES]
    by_images = made_of.lines(chosen, batches, seed)
    first = 3 if workload.global_batch >= 64 else 0
    counts = [2**n for n in range(first, 13) if 2**n <= workload.global_batch]
    by_devices = made_of.lines(chosen, [(workload, n) for n in counts], seed)
    taus = made_of.effective(chosen, workload, devices, seed)
    fit = calibrate.compare()
    pictures = [*_pictures(chosen, workload, by_images, by_devices, taus, fit, seed), *_dynamics(dynamics)]
    html = render(
        "staleness/report/page.html",
        cluster=chosen.name, recipe=workload.name, about=chosen.about,
        compute=asdict(chosen.of(workload.model, workload.precision)),
        attack=asdict(chosen.attack), batch=workload.global_batch, staleness=named("conadv", workload).staleness,
        steps=workload.steps, devices=devices, what_if=made_of.summary(what_if),
        simple=made_of.simple(chosen, workload),
        fit=fit.to_dict("records"), has_dynamics=any(p.part == "dynamics" for p in pictures),
        pictures=[{"part": p.part, "title": p.title, "text": p.text, "svg": svg(p.figure)} for p in pictures],
    )  # fmt: skip
    tables = {
        "what if": what_if,
        "images per device": by_images,
        "devices": by_devices,
        "effective tau": taus,
    }
    rows = pd.concat([frame.assign(table=name) for name, frame in tables.items()], ignore_index=True)
    return Made(html, rows, tuple(pictures))


def save_figures(made: Made, folder: Path) -> None:
    """Each figure as PNG and PDF."""
    for picture in made.pictures:
        save(picture.figure, folder, picture.name)


def read_rows(path: Path | None) -> pd.DataFrame | None:
    """Rows of the dynamics from ``.csv`` or ``.json`` ({"rows": […]}); None for None.

    Raises:
        ValueError: no such file, an unsupported format, or missing columns.
    """
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"{path} is no file; allowed: the table that dynamics --csv or --json wrote")
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path} is not a table; allowed: a .csv or .json file of the dynamics")
    try:
        frame = (
            pd.read_csv(path) if path.suffix == ".csv" else pd.DataFrame(json.loads(path.read_text())["rows"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of the dynamics: {type(error).__name__}: {error}") from None
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    return frame


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
            ("ConAdv, stream: the next batch is attacked during the step", "conadv", {"placement": "stream"}),
            (
                "ConAdv, ranks: 2 of 8 devices attack the next batch",
                "conadv",
                {"placement": "ranks", "attackers": 2},
            ),
        )
    ]
    seen = "8 devices, 128 images per step, stragglers of 5 %. Lines mark weight updates."
    images = f"{WORKERS} workers; the global batch grows with the images."
    counts = f"Global batch {workload.global_batch:,}, shared by the devices."
    stale = (
        "Attackers start with the newest weights they have. If there are too few of them, steps wait for them, and "
        "their weights are fresher than τ allows. Stragglers of 10 %."
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
        Picture("steps", "tau", "Effective staleness", stale, figures.effective_tau(taus)),
        Picture("fit", "fit", "Residuals of the fit", band, figures.residuals(fit)),
    ]


def _dynamics(frame: pd.DataFrame | None) -> list[Picture]:
    if frame is None:
        return []
    runs = frame["phase"] == WHOLE
    return [
        Picture("dynamics", name, title, text, neutral(dynamics_figures.page(own, columns=2)))
        for name, title, text, own in (
            ("dynamics", "Accuracy and sharpness against τ",
             "Measured in training runs; means over seeds, with standard deviations if several.", frame[runs]),
            ("probes", "Stale versus fresh attacks against τ and τ · learning rate",
             "Measured in the same runs; bars are standard deviations over steps, workers and seeds.", frame[~runs]),
        )
        if len(own)
    ]  # fmt: skip
