"""Predicts what a run will cost before it is sent; all values are labelled as predicted. Nothing here imports torch.

Memory is counted from the model itself (`conadv_lab.footprint`). Time comes from the simulator (`conadv_lab.staleness`)
with constants for H100s that were fitted to other people's tuned runs: this package may be slower.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from conadv_lab.displays import table
from conadv_lab.mistakes import counted, require

if TYPE_CHECKING:
    import pandas as pd

    from conadv_lab.config import Config
    from conadv_lab.methods.base import Method

CLUSTER = "h100"
SIMULATED_STEPS = 200


@dataclass(frozen=True)
class Plan:
    """What a step needs on each device, in bytes and images.

    Attributes:
        devices: how many share a step; the last ``attackers`` of them only attack.
        images: clean images per step on each training device; attacked: images per attacker.
        micro_batch: images per forward pass.
        memory: bytes on the device by purpose; on a CPU this is the same memory as ``host``.
        host: bytes of a process on the host, by purpose.
        network: bytes that each training device sends per step.
        steps: of the run; None if the size of the data set is unknown here.
        step_ms, minutes: predicted time of a step and of the run, failures included, on H100s; None for models other
            than ResNet-50 at 224 pixels in bfloat16.
    """

    devices: int
    attackers: int
    images: float
    attacked: float
    micro_batch: int
    memory: dict[str, int]
    host: dict[str, int]
    network: int
    step_ms: float | None = None
    steps: int | None = None
    minutes: float | None = None

    def peak(self) -> int:
        """Peak bytes of a process that trains on the CPU."""
        return sum(self.memory.values()) + sum(self.host.values())

    def to_frame(self) -> "pd.DataFrame":
        """The predictions, one per row: ``quantity``, ``value`` and ``unit``."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["quantity", "value", "unit"])

    def _repr_html_(self) -> str:
        rows = [
            (name, value / 1e9, "GB") if unit == "bytes" else (name, value, unit)
            for name, value, unit in self._rows()
        ]
        return table(("predicted, not measured", "value", "unit"), rows)

    def _rows(self) -> list[tuple[str, float, str]]:
        rows: list[tuple[str, float | None, str]] = [
            ("devices", self.devices, ""),
            ("of them attackers", self.attackers or None, ""),
            ("clean images per device and step", self.images, "images"),
            ("micro-batch", self.micro_batch, "images"),
            *((f"device memory, {name}", size, "bytes") for name, size in self.memory.items()),
            *((f"host memory per process, {name}", size, "bytes") for name, size in self.host.items()),
            ("sent per device and step", self.network, "bytes"),
            ("step on H100s", self.step_ms, "ms"),
            ("steps", self.steps, ""),
            ("whole run on H100s", self.minutes, "minutes"),
        ]
        return [(name, value, unit) for name, value, unit in rows if value is not None]

    def text(self) -> str:
        """The plan as text for a terminal."""
        batches = -(-round(self.images) // self.micro_batch)
        several = "es" if batches > 1 else ""
        devices = counted(self.devices, "device")
        attackers = f"attackers         {self.attackers}, each attacks {self.attacked:,.0f} images per step"
        lines = [
            f"predicted, not measured, for a step on {devices}:",
            f"images per device {self.images:,.0f} clean, in {batches:,} micro-batch{several} of {self.micro_batch:,}",
            *([attackers] if self.attackers else []),
            f"device memory     {_told(self.memory)}",
            f"host memory       {_told(self.host)}, per process",
            f"network           {self.network / 1e6:,.0f} MB sent per device",
        ]
        if self.step_ms is None or self.minutes is None:
            return "\n".join(
                [*lines, "time              no prediction for this model, image size and precision"]
            )
        whole = f"{self.minutes / 60:,.1f} hours" if self.minutes >= 120 else f"{self.minutes:,.1f} minutes"
        lines.append(f"step              {self.step_ms:,.1f} ms on H100s")
        return "\n".join([*lines, f"whole run         {whole} on H100s, {self.steps:,} steps"])


def _told(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 1e9:.2f} GB: {listed}"


def plan_of(config: "Config", devices: int = 1) -> Plan:
    """The plan of a config on this many devices, attackers included; reads no data.

    Builds the model and runs two images through it on the CPU.

    Raises:
        ValueError: an invalid config, or more devices than images.
    """
    from conadv_lab.config import check_method, resolved
    from conadv_lab.footprint import host_bytes, memory_bytes
    from conadv_lab.methods import method_of

    config = resolved(config)
    method, attackers = method_of(config), config.method.attackers
    check_method(config, method)
    clean = round(config.training.global_batch * min(1, method.new_fraction))
    what = "attackers and the clean images" if attackers else "clean images"
    allowed = f"{attackers + 1} to {attackers + clean}, the {what} of a step"
    require(attackers < devices <= attackers + clean, "devices", devices, allowed)
    trainers = devices - attackers
    images = clean / trainers
    micro_batch = min(config.training.micro_batch or clean, ceil(images))
    host = host_bytes(config)  # before the model adds to this process's memory
    memory, parameters = memory_bytes(config, images, micro_batch, several=trainers > 1)
    if attackers:  # the signs wait on the host, where they arrive
        host["pending attacks"] = memory.pop("pending attacks")
    return Plan(
        devices,
        attackers,
        images,
        config.training.global_batch / attackers if attackers else 0.0,
        micro_batch,
        memory,
        host,
        # Ring all-reduce of float32 gradients: each device sends 2 (n − 1) / n of their size.
        network=round(2 * (trainers - 1) / trainers * 4 * parameters),
        **times(config, method, devices),
    )


def times(config: "Config", method: "Method", devices: int) -> dict[str, Any]:
    """The simulator's ``step_ms``, ``steps`` and ``minutes`` for a resolved config; empty without constants for it.

    >>> from conadv_lab.config import resolved
    >>> from conadv_lab.methods import method_of
    >>> from conadv_lab.recipes import find
    >>> config = resolved(find("imagenet-resnet50-4k")())
    >>> round(times(config, method_of(config), 64)["minutes"], 1)
    5.8
    """
    from conadv_lab.staleness.timeline.cluster import load
    from conadv_lab.staleness.timeline.recursion import timeline
    from conadv_lab.staleness.timeline.simulation import row
    from conadv_lab.staleness.timeline.step_times import step_times
    from conadv_lab.staleness.timeline.workload import workload_of

    data, training, section = config.data, config.training, config.method
    cluster, network = load(CLUSTER), config.model
    known = (network.model, data.dataset, data.pixels) == ("resnet50", "imagenet", 224)
    if not known or network.precision != cluster.of("resnet50").precision:
        return {}
    workload = workload_of(config)
    batch = training.global_batch * method.new_fraction / method.replays
    steps = training.steps or max(1, round(training.epochs * workload.images / batch))
    attackers = section.attackers if section.placement == "ranks" else None
    own = step_times(
        cluster, workload, method, devices,
        placement=section.placement, attackers=attackers, capture=training.capture,
    )  # fmt: skip
    found = row(
        cluster, workload.replace(fixed_steps=steps), timeline(own, cluster.stragglers, SIMULATED_STEPS)
    )
    return {"step_ms": found["step_ms"], "steps": steps, "minutes": 60 * found["hours"]}
