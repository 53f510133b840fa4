"""The verbs timeline, fit and clusters: parse, call, print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from conadv_lab import cli, reading
from conadv_lab.mistakes import require, writable
from conadv_lab.staleness.timeline.options import SEVERAL, FitOptions, TimelineOptions

if TYPE_CHECKING:
    import pandas as pd

    from conadv_lab.staleness.timeline.cluster import Cluster

Kind = TypeVar("Kind")
SHOWN = {
    "method": "method", "placement": "placement", "devices": "devices", "attackers": "attackers",
    "images_per_device": "img/device", "step_ms": "step ms", "utilisation": "used", "tau_mean": "mean τ",
    "hours": "hours", "device_hours": "device-hours",
}  # fmt: skip
FITTED = ["step_ms", "predicted_ms", "residual", "fitted", "within"]


def timeline(words: list[str]) -> int:
    """Print the table."""
    import pandas as pd

    from conadv_lab.staleness.timeline import simulation as sim
    from conadv_lab.staleness.timeline.cluster import load, to_toml
    from conadv_lab.staleness.timeline.workload import workload_of

    asked = _parsed(TimelineOptions, words, "timeline")
    asked.files.require_writable()
    writable(asked.save, asked.trace)
    cluster = load(asked.cluster or ("this-machine" if asked.calibrate else "h100"))
    recipe: Any = asked.recipe or "imagenet-resnet50-32k"
    if asked.calibrate:
        cluster, recipe = _calibrated(cluster, asked)
    cluster = cluster.replace(**_changes(asked.set))
    workload = workload_of(recipe).replace(joint=asked.joint)
    if asked.global_batch is not None:
        workload = workload.replace(global_batch=asked.global_batch)
    devices = ((1,) if asked.calibrate else (64,)) if asked.devices is None else asked.devices
    options: dict[str, Any] = {
        "staleness": asked.staleness, "steps": asked.steps, "seed": asked.seed, "ascent_share": asked.ascent_share,
        "capture": asked.capture,
    }  # fmt: skip
    if asked.best:
        method = _method_of_best(asked, devices)
        placed = sim.best(cluster, workload, method, devices=devices[0], **options)
        others = sim.simulate(cluster, workload, _baselines(method), devices=devices, **options)
        frame = pd.concat([placed, others]).sort_values("step_ms", kind="stable", ignore_index=True)
    else:
        frame = sim.simulate(
            cluster, workload, asked.method, devices=devices, placement=asked.placement,
            attackers=_number(asked.attackers), **options,
        )  # fmt: skip
    if asked.trace is not None:
        _trace(asked.trace, cluster, workload, asked, devices, options)
    print(
        f"{cluster.name}, {workload.name}, global batch {workload.global_batch:,}: predicted by a model, not measured"
    )
    _print(frame[list(SHOWN)].rename(columns=SHOWN))
    if asked.save is not None:
        asked.save.write_text(to_toml(cluster))
    asked.files.write(frame)
    return 0


def fit(words: list[str]) -> int:
    """Print measured and predicted step times."""
    import pandas as pd

    from conadv_lab.staleness.timeline import calibrate, one_device

    asked = _parsed(FitOptions, words, "fit")
    asked.files.require_writable()
    frame = calibrate.compare(fitted_only=not asked.all_rows)
    for name, rows in frame.groupby("cluster", sort=False):
        one = rows.iloc[0]
        print(
            f"{name}: a pass takes {one.fixed_ms:.3f} ms + {one.image_ms:.4f} ms per image; within ±{one.tolerance:.0%}"
        )
    _print(_residuals(frame)[["cluster", "devices", "images_per_device", *FITTED]])
    steps = one_device.compare().assign(cluster=one_device.CLUSTER)
    print(f"{one_device.CLUSTER}, steps of one device; within ±{one_device.TOLERANCE:.0%}")
    _print(_residuals(steps)[["capture", "method", "beside", "images", *FITTED]])
    if asked.every_choice:
        for name in calibrate.TOLERANCE:
            good, count = calibrate.every_choice(name)
            print(f"{name}: {good} of {count} choices of equally many rows bring all rows within tolerance")
    asked.files.write(pd.concat([frame, steps]))
    return 0


def _residuals(frame: "pd.DataFrame") -> "pd.DataFrame":
    return frame.assign(residual=[f"{100 * (ratio - 1):+.1f} %" for ratio in frame["ratio"]])


def clusters(words: list[str]) -> int:
    """Print the built-in clusters."""
    from conadv_lab.staleness.timeline.cluster import load, names

    if words:
        raise ValueError(f"clusters takes no options, got {' '.join(words)!r}")
    for name in names():
        cluster = load(name)
        print(f"{name:14} {cluster.about} ({', '.join(cluster.compute)})")
    return 0


def _calibrated(cluster: "Cluster", asked: TimelineOptions) -> tuple["Cluster", Any]:
    from conadv_lab.runs import RunFolder
    from conadv_lab.staleness.timeline.calibrate import from_runs

    cluster, lines = from_runs(cluster, asked.calibrate)
    print(f"{'run':32} {'method':15} {'batch':>6} {'measured ms':>12} {'fitted ms':>10} {'ratio':>6}")
    for line in lines:
        print(
            f"{Path(line['run']).name:32} {line['method']:15} {line['global_batch']:>6} "
            f"{line['measured_ms']:12.2f} {line['fitted_ms']:10.2f} {line['ratio']:6.3f}"
        )
    config = RunFolder(asked.calibrate[0]).config()
    one = cluster.of(config.model.model)
    print(f"{config.model.model}: a pass takes {one.fixed_ms:.4g} ms + {one.image_ms:.4g} ms per image")
    return cluster, asked.recipe or config


def _changes(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    form = "SECTION.KEY=VALUE, such as network.card_gbs=24"
    for place, value in reading.pairs("--set", words, form).items():
        section, dot, key = place.partition(".")
        if section == "compute" or not dot:
            allowed = (
                "any section but compute, which is set by --calibrate RUN or a TOML file" if dot else form
            )
            raise ValueError(f"--set is {f'{place}={value}'!r}; allowed: {allowed}")
        changes.setdefault(section, {})[key] = value
    return changes


def _method_of_best(asked: TimelineOptions, devices: Sequence[int]) -> str:
    require(len(devices) == 1, "devices", devices, "one number with --best")
    for name, value, unasked in (
        ("placement", asked.placement, ("serial",)),
        ("attackers", asked.attackers, None),
    ):
        if value != unasked:
            told = " ".join(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} is {told!r}; allowed with --best: none, as it tries all")
    if asked.method == SEVERAL:
        return "conadv"
    require(len(asked.method) == 1, "method", " ".join(asked.method), "one with --best")
    return asked.method[0]


def _baselines(method: str) -> list[str]:
    """Baselines for `best`: vanilla, and the method that waits for its own attack or ascent."""
    return ["vanilla", {"conadv": "disadv", "asyncsam": "sam", "sampa": "sam"}.get(method, "disadv")]


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
        raise ValueError(f"attackers is {text!r}; allowed: a number, or a fraction such as 0.25") from None


def _trace(
    path: Path, cluster: "Cluster", workload: Any, asked: TimelineOptions, devices: Sequence[int],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Write the trace of the single requested combination."""
    from conadv_lab.staleness.timeline.recursion import write_trace
    from conadv_lab.staleness.timeline.simulation import attackers_of, one_timeline

    combinations = len(asked.method) * len(asked.placement) * len(devices)
    if combinations != 1 or asked.best:
        raise ValueError(
            f"--trace needs one row, but there are {combinations}; give one method, placement and number of devices"
        )
    count = attackers_of(_number(asked.attackers), devices[0]) if asked.placement[0] == "ranks" else None
    done = one_timeline(
        cluster, workload, asked.method[0], devices=devices[0], placement=asked.placement[0], attackers=count,
        **options,
    )  # fmt: skip
    write_trace(path, done.trace)


def _print(frame: "pd.DataFrame") -> None:
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def _parsed(kind: type[Kind], words: list[str], verb: str) -> Kind:
    return cli.parsed(kind, words, f"conadv_lab.staleness {verb}")
