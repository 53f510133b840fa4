"""The verbs of ``python -m conadv_lab.staleness`` that belong to the timeline: parse, call, print."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from conadv_lab.mistakes import require

if TYPE_CHECKING:
    import pandas as pd

    from conadv_lab.staleness.cluster import Cluster

Kind = TypeVar("Kind")
SHOWN = {
    "method": "method", "placement": "placement", "devices": "devices", "attackers": "attackers",
    "images_per_device": "img/device", "step_ms": "step ms", "utilisation": "used", "tau_mean": "mean τ",
    "hours": "hours", "device_hours": "device-hours",
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """What to write"""

    json: Path | None = None
    """The table's rows, as {"rows": […]}."""
    csv: Path | None = None
    """The same as CSV."""


@dataclass(frozen=True)
class Timeline:
    """Step time, utilisation, effective staleness and price of a recipe on a cluster. A model, not a measurement."""

    cluster: str | None = None
    """A built-in name (see clusters) or a TOML file; None: h100, or this-machine with --calibrate."""
    recipe: str | None = None
    """imagenet-resnet50-32k and its like, or a recipe of train; None: the former, or that of the run."""
    method: tuple[str, ...] = ("vanilla", "disadv", "conadv", "recycled", "recycled-equal", "sam", "asyncsam")
    """One or several."""
    devices: tuple[int, ...] | None = None
    """How many; one or several. None: 64, or 1 with --calibrate."""
    placement: tuple[str, ...] = ("serial",)
    """Of conadv's attack and asyncsam's ascent: serial, stream, ranks."""
    attackers: str | None = None
    """With ranks: their number, or as a decimal fraction their share of the devices; None: a quarter."""
    staleness: int | None = None
    """τ; None: the recipe's."""
    global_batch: int | None = None
    """Images of a step; None: the recipe's."""
    joint: bool = False
    """Clean and adversarial images in one pass of twice the size, instead of one pass each."""
    ascent_share: float = 1.0
    """Share of a batch that asyncsam's ascent looks at."""
    steps: int = 200
    """Simulated steps."""
    seed: int = 0
    """Of stragglers and interruptions."""
    set: tuple[str, ...] = ()
    """Other constants, such as network.card_gbs=24 stragglers.spread=0.1 failures.preemption_hours=4."""
    best: bool = False
    """Every placement and share of attackers instead, the fastest first."""
    calibrate: tuple[Path, ...] = ()
    """Run folders of one model: fit its compute constants to their images per second."""
    save: Path | None = None
    """Write the cluster with all changes as a TOML file."""
    trace: Path | None = None
    """Write the effective τ of each step and worker, as .npy or .csv; needs one row."""
    files: tyro.conf.OmitArgPrefixes[Files] = field(default_factory=Files)


@dataclass(frozen=True)
class Fit:
    """MLPerf's step times against predictions whose constants were fitted on at most half of them."""

    all_rows: bool = False
    """Fit on every row instead, to see what the model cannot do."""
    every_choice: bool = False
    """Count from how many other choices of as many rows all come out within tolerance."""
    files: tyro.conf.OmitArgPrefixes[Files] = field(default_factory=Files)


@dataclass(frozen=True)
class Page:
    """One self-contained page, and its figures and table on request."""

    html: Path
    """The page."""
    cluster: str = "h100"
    """A built-in name or a TOML file."""
    recipe: str = "imagenet-resnet50-32k"
    """What is trained."""
    devices: int = 512
    """Of the what-if table."""
    dynamics: Path | None = None
    """Rows of the dynamics (.csv or .json) whose accuracy and sharpness against τ are drawn too."""
    figures: Path | None = None
    """Folder for the figures as PNG and PDF."""
    seed: int = 0
    """Of stragglers and interruptions."""
    files: tyro.conf.OmitArgPrefixes[Files] = field(default_factory=Files)


def timeline(words: list[str]) -> int:
    """Print the table."""
    from conadv_lab.staleness import simulation as sim
    from conadv_lab.staleness.cluster import load, to_toml
    from conadv_lab.staleness.workload import workload_of

    asked = _parsed(Timeline, words, "timeline")
    _writable(asked.files.json, asked.files.csv, asked.save, asked.trace)
    cluster = load(asked.cluster or ("this-machine" if asked.calibrate else "h100"))
    recipe: Any = asked.recipe or "imagenet-resnet50-32k"
    if asked.calibrate:
        cluster, recipe = _calibrated(cluster, asked)
    cluster = cluster.replace(**_changes(asked.set))
    workload = workload_of(recipe).replace(joint=asked.joint)
    if asked.global_batch is not None:
        workload = workload.replace(global_batch=asked.global_batch)
    devices = ((1,) if asked.calibrate else (64,)) if asked.devices is None else asked.devices
    options: dict[str, Any] = {"staleness": asked.staleness, "steps": asked.steps, "seed": asked.seed}
    if asked.best:
        require(len(devices) == 1, "devices", devices, "one number with --best")
        methods = [m for m in asked.method if m in ("conadv", "asyncsam")]
        method = methods[0] if methods else "conadv"
        frame = sim.best(cluster, workload, method, devices=devices[0], **options)
    else:
        frame = sim.simulate(
            cluster, workload, asked.method, devices=devices, placement=asked.placement,
            attackers=_number(asked.attackers), ascent_share=asked.ascent_share, **options,
        )  # fmt: skip
    if asked.trace is not None:
        _trace(asked.trace, cluster, workload, asked, devices)
    print(
        f"{cluster.name}, {workload.name}, global batch {workload.global_batch:,}: predicted by a model, not measured"
    )
    _print(frame[list(SHOWN)].rename(columns=SHOWN))
    if asked.save is not None:
        asked.save.write_text(to_toml(cluster))
    _write(frame, asked.files)
    return 0


def fit(words: list[str]) -> int:
    """Print measured and predicted step times."""
    from conadv_lab.staleness import calibrate

    asked = _parsed(Fit, words, "fit")
    _writable(asked.files.json, asked.files.csv)
    frame = calibrate.compare(fitted_only=not asked.all_rows)
    for name, rows in frame.groupby("cluster", sort=False):
        one = rows.iloc[0]
        print(
            f"{name}: a pass takes {one.fixed_ms:.3f} ms + {one.image_ms:.4f} ms an image; within ±{one.tolerance:.0%}"
        )
    shown = frame.assign(residual=[f"{100 * (ratio - 1):+.1f} %" for ratio in frame["ratio"]])
    _print(
        shown[
            [
                "cluster",
                "devices",
                "images_per_device",
                "step_ms",
                "predicted_ms",
                "residual",
                "fitted",
                "within",
            ]
        ]
    )
    if asked.every_choice:
        for name in calibrate.TOLERANCE:
            good, count = calibrate.every_choice(name)
            print(f"{name}: {good} of {count} choices of as many rows bring all rows within tolerance")
    _write(frame, asked.files)
    return 0


def report(words: list[str]) -> int:
    """Write the page."""
    from conadv_lab.staleness import report as page

    asked = _parsed(Page, words, "report")
    _writable(asked.files.json, asked.files.csv, asked.html)
    made = page.build(
        asked.cluster,
        asked.recipe,
        devices=asked.devices,
        seed=asked.seed,
        dynamics=page.read_rows(asked.dynamics),
    )
    asked.html.write_text(made.html)
    _write(made.rows, asked.files)
    if asked.figures is not None:
        page.save_figures(made, asked.figures)
    print(asked.html)
    return 0


def clusters(words: list[str]) -> int:
    """Print the built-in clusters."""
    from conadv_lab.staleness.cluster import load, names

    if words:
        raise ValueError(f"clusters takes no options, got {' '.join(words)!r}")
    for name in names():
        cluster = load(name)
        print(f"{name:14} {cluster.about} ({', '.join(cluster.compute)})")
    return 0


def _calibrated(cluster: "Cluster", asked: Timeline) -> tuple["Cluster", Any]:
    from conadv_lab.runs import RunFolder
    from conadv_lab.staleness.calibrate import from_runs

    cluster, lines = from_runs(cluster, asked.calibrate)
    print(f"{'run':32} {'method':15} {'batch':>6} {'measured ms':>12} {'fitted ms':>10} {'ratio':>6}")
    for line in lines:
        print(
            f"{Path(line['run']).name:32} {line['method']:15} {line['global_batch']:>6} "
            f"{line['measured_ms']:12.2f} {line['fitted_ms']:10.2f} {line['ratio']:6.3f}"
        )
    config = RunFolder(asked.calibrate[0]).config()
    one = cluster.of(config.model.model)
    print(f"{config.model.model}: a pass takes {one.fixed_ms:.4g} ms + {one.image_ms:.4g} ms an image")
    return cluster, asked.recipe or config


def _changes(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for word in words:
        place, equals, text = word.partition("=")
        section, dot, key = place.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set is {word!r}; allowed: SECTION.KEY=VALUE, such as network.card_gbs=24")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        changes.setdefault(section, {})[key] = value
    return changes


def _number(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"attackers are {text!r}; allowed: a number, or a share such as 0.25") from None


def _trace(path: Path, cluster: "Cluster", workload: Any, asked: Timeline, devices: Sequence[int]) -> None:
    """Write the trace of the one combination that is asked for."""
    from conadv_lab.staleness.simulation import attackers_of, one_timeline
    from conadv_lab.staleness.timeline import write_trace

    combinations = len(asked.method) * len(asked.placement) * len(devices)
    if combinations != 1 or asked.best:
        raise ValueError(
            f"--trace needs one row, but {combinations} are asked for; name one method, placement and number of devices"
        )
    count = attackers_of(_number(asked.attackers), devices[0]) if asked.placement[0] == "ranks" else None
    done = one_timeline(
        cluster, workload, asked.method[0], devices=devices[0], placement=asked.placement[0], attackers=count,
        ascent_share=asked.ascent_share, staleness=asked.staleness, steps=asked.steps, seed=asked.seed,
    )  # fmt: skip
    write_trace(path, done.trace)


def _print(frame: "pd.DataFrame") -> None:
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def _write(frame: "pd.DataFrame", files: Files) -> None:
    from conadv_lab.runs import write_json

    if files.json is not None:
        rows = [{k: None if v != v else v for k, v in row.items()} for row in frame.to_dict("records")]
        write_json(files.json, {"rows": rows})
    if files.csv is not None:
        frame.to_csv(files.csv, index=False)


def _writable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written; allowed: a file in a folder that exists")


def _parsed(kind: type[Kind], words: list[str], verb: str) -> Kind:
    return tyro.cli(kind, args=words, prog=f"conadv_lab.staleness {verb}")
