"""A cluster in the simulator: a small TOML file of constants, read and checked.

A cluster is a built-in name (``names()``) or the path of a TOML file. Times are in milliseconds, microseconds or
seconds as named, bandwidths in 10⁹ bytes per second. Each constant's source is noted beside it in the file.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from conadv_lab import reading
from conadv_lab.mistakes import COUNT, Range, require, unknown


@dataclass(frozen=True)
class Compute:
    """One model on one device: a training pass of b images takes ``fixed_ms + image_ms · b``."""

    fixed_ms: float
    """Fixed cost of a pass, however few its images: launches, and kernels too small to fill the device."""
    image_ms: float
    """Cost per image of forward, input gradient and weight gradient."""
    optimizer_ms: float = 0.0
    """Time of a step's optimiser update, after the gradients are averaged; 0 if included in fixed_ms."""
    precision: str | None = None
    """Precision for which they hold: float32, bfloat16 or float64; None: any."""
    launches: int = 0
    """Operators that the host launches per training pass, unless a CUDA graph replays them; 0: unknown."""
    attack_launches: int = 0
    """The same for an attack pass."""
    together_launches: int = 0
    """The same for a joint pass of clean and altered images, each half with its own batch statistics."""


@dataclass(frozen=True)
class Attack:
    """An attack pass relative to a training pass: no parameter gradients."""

    fixed_share: float = 0.6
    """Fraction of fixed_ms."""
    image_share: float = 2 / 3
    """Fraction of image_ms: forward and input gradient, of three equal parts."""
    overlap: float = 1.0
    """Fraction hidden of all fixed costs but the largest when passes share a device (placement stream)."""


@dataclass(frozen=True)
class Host:
    """What drives a device."""

    launch_us: float | None = None
    """Time to launch one operator; None: unknown, and steps are assumed to be replayed from CUDA graphs."""


@dataclass(frozen=True)
class Network:
    """Links within a node and between nodes."""

    devices_per_node: int = 8
    node_gbs: float = 370.0
    """Bus bandwidth within a node."""
    cards_per_node: int = 8
    card_gbs: float = 47.0
    """Bandwidth of one network card."""
    model: str = "nccl"
    """nccl: NCCL's published latencies and protocols; alpha-beta: the two hop times below, full bandwidth."""
    node_hop_us: float = 1.0
    network_hop_us: float = 5.0
    algorithm: str = "auto"
    """Of the all-reduce: ring, tree, hierarchical, or auto for the fastest."""
    bucket_mb: float = 25.0
    """Bucket size in which gradients are averaged during the backward pass; the first bucket has 1 MB."""


@dataclass(frozen=True)
class Stragglers:
    """Variation of compute time: an independent factor for each device and step."""

    kind: str = "none"
    """none; lognormal: exp(spread·z − spread²/2), mean 1; exponential: 1 + spread·E with E of mean 1."""
    spread: float = 0.0
    slow_devices: int = 0
    """How many devices, the first ones, are always slower."""
    slow_factor: float = 1.0


@dataclass(frozen=True)
class Input:
    """The loader of each device."""

    images_per_second: float | None = None
    """Throughput of one device's loader; None: never a bottleneck."""
    prefetch: int = 2
    """How many batches it may be ahead."""


@dataclass(frozen=True)
class Failures:
    """Interruptions of a run and their cost."""

    device_hours: float | None = None
    """Mean hours between failures of one device; None: never. Work since the last checkpoint is lost."""
    preemption_hours: float | None = None
    """Mean hours between preemptions of the job; None: never. The job saves before it stops."""
    checkpoint_s: float = 10.0
    """How long a checkpoint blocks training."""
    restart_s: float = 120.0
    """Time from the end of the queue to the first step."""
    requeue_s: float = 120.0
    """Time in the queue after a preemption."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: Young's interval √(2 · checkpoint · mean time between failures)."""


@dataclass(frozen=True)
class Cluster:
    """All constants of one cluster; ``compute`` has an entry for each model measured on it."""

    name: str
    about: str = ""
    compute: Mapping[str, Compute] = field(default_factory=dict)
    attack: Attack = field(default_factory=Attack)
    host: Host = field(default_factory=Host)
    network: Network = field(default_factory=Network)
    stragglers: Stragglers = field(default_factory=Stragglers)
    input: Input = field(default_factory=Input)
    failures: Failures = field(default_factory=Failures)

    def of(self, model: str, precision: str | None = None) -> Compute:
        """The model's compute constants.

        Raises:
            ValueError: not measured on this cluster, or not in this precision.
        """
        if model not in self.compute:
            raise ValueError(
                f"cluster {self.name} has no constants for model {model!r}; allowed: "
                f"{', '.join(sorted(self.compute)) or 'none'}. Fit them with --calibrate RUN"
            )
        found = self.compute[model]
        if None not in (precision, found.precision) and precision != found.precision:
            raise ValueError(
                f"precision is {precision!r}; allowed: {found.precision!r}, for which cluster {self.name} has "
                f"constants of {model}. Fit others with --calibrate RUN"
            )
        return found

    def replace(self, **sections: Any) -> "Cluster":
        """A checked copy; each section is a mapping of changed values.

        >>> load("h100").replace(stragglers={"spread": 0.1}).stragglers.spread
        0.1
        """
        changed: dict[str, Any] = {}
        for name, values in sections.items():
            if name not in SECTIONS:
                raise unknown("section of a cluster", name, SECTIONS)
            reading.require_kinds(SECTIONS[name], values, f"[{name}]")
            changed[name] = dataclasses.replace(getattr(self, name), **values)
        return checked(dataclasses.replace(self, **changed))


SECTIONS: dict[str, Any] = {
    "attack": Attack,
    "host": Host,
    "network": Network,
    "stragglers": Stragglers,
    "input": Input,
    "failures": Failures,
}


def names() -> list[str]:
    """The built-in clusters."""
    folder = files("conadv_lab.staleness.timeline") / "clusters"
    return sorted(file.name[: -len(".toml")] for file in folder.iterdir() if file.name.endswith(".toml"))


def load(name: "str | Cluster") -> Cluster:
    """Load a cluster by built-in name or TOML file; a `Cluster` is returned unchanged.

    Raises:
        ValueError: no such cluster, an unknown key, or an invalid value.
    """
    if isinstance(name, Cluster):
        return name
    if name.endswith(".toml"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(f"cluster {name!r} does not exist; allowed: a name, or a path to a TOML file")
        return parse(file.read_text(), file.stem, str(file))
    if name not in names():
        raise unknown("cluster", name, names())
    text = (files("conadv_lab.staleness.timeline") / "clusters" / f"{name}.toml").read_text()
    return parse(text, name, f"{name}.toml")


def parse(text: str, name: str, where: str) -> Cluster:
    """Parse a cluster from TOML; ``where`` names its source in errors."""
    values = reading.toml(text, where)
    sections: dict[str, Any] = {"name": name}
    for key, value in values.items():
        if key == "about":
            sections["about"] = str(value)
        elif key == "compute":
            if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
                raise ValueError(f"compute in {where} is {value!r}; allowed: a table for each model")
            sections["compute"] = {
                m: reading.read(Compute, v, f"[compute.{m}] in {where}") for m, v in value.items()
            }
        elif key in SECTIONS and isinstance(value, dict):
            sections[key] = reading.read(SECTIONS[key], value, f"[{key}] in {where}")
        else:
            raise unknown(f"section of {where}", key, ["about", "compute", *SECTIONS])
    return checked(Cluster(**sections))


def checked(cluster: Cluster) -> Cluster:
    """Return the cluster after checking it.

    Raises:
        ValueError: at the first invalid value.
    """
    for model, one in cluster.compute.items():
        _from_0(f"compute.{model}", one, "fixed_ms", "image_ms", "optimizer_ms")
        _from_0(f"compute.{model}", one, "launches", "attack_launches", "together_launches")
        positive = one.fixed_ms + one.image_ms > 0
        require(positive, f"compute.{model}", one, "fixed_ms or image_ms above 0")
    attack, network, noise = cluster.attack, cluster.network, cluster.stragglers
    _from_0("attack", attack, "fixed_share", "image_share")
    require(0 <= attack.overlap <= 1, "attack.overlap", attack.overlap, "0 to 1")
    _from_0("host", cluster.host, "launch_us")
    _from_1("network", network, "devices_per_node", "cards_per_node")
    _above_0("network", network, "node_gbs", "card_gbs", "bucket_mb")
    _from_0("network", network, "node_hop_us", "network_hop_us")
    _one_of("network model", network.model, ("nccl", "alpha-beta"))
    _one_of("network algorithm", network.algorithm, ("auto", "ring", "tree", "hierarchical"))
    _one_of("kind of stragglers", noise.kind, ("none", "lognormal", "exponential"))
    _from_0("stragglers", noise, "spread", "slow_devices")
    require(1 <= noise.slow_factor < math.inf, "stragglers.slow_factor", noise.slow_factor, "at least 1")
    _above_0("input", cluster.input, "images_per_second")
    _from_1("input", cluster.input, "prefetch")
    _above_0("failures", cluster.failures, "device_hours", "preemption_hours")
    _from_0("failures", cluster.failures, "checkpoint_s", "restart_s", "requeue_s")
    _from_1("failures", cluster.failures, "checkpoint_every")
    return cluster


def _required(limits: Range, section: str, values: Any, *keys: str) -> None:
    """Check a section's fields; None is always allowed."""
    holds, allowed = limits
    for key in keys:
        value = getattr(values, key)
        require(value is None or holds(value), f"{section}.{key}", value, allowed)


_from_0 = partial(_required, (lambda value: 0 <= value < math.inf, "a finite number of at least 0"))
_from_1 = partial(_required, COUNT)
# Infinite is allowed: a network without cost.
_above_0 = partial(_required, (lambda value: value > 0, "above 0"))


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise unknown(what, value, allowed)


def to_toml(cluster: Cluster) -> str:
    """The inverse of `parse`."""
    lines = [f"about = {_quoted(cluster.about)}"]
    for model, one in cluster.compute.items():
        lines += ["", f"[compute.{_quoted(model)}]", *_lines(one)]
    for name in SECTIONS:
        lines += ["", f"[{name}]", *_lines(getattr(cluster, name))]
    return "\n".join(lines) + "\n"


def _lines(section: Any) -> list[str]:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return [f"{k} = {_quoted(v) if isinstance(v, str) else v}" for k, v in values.items() if v is not None]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'
