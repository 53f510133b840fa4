"""What a run will cost, before it is sent: figures from a model, each labelled predicted. Nothing here imports torch.

Step time is the straight line 3.48 ms + 0.1434 ms an image that fits MLPerf's ResNet-50 results on H100s within −6 to
+7 % (training_results v2.1 and v3.0: tuned MXNet and DALI, vanilla, 16 to 400 images a device). It is no measurement
of this package, which may be slower.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from conadv_lab.mistakes import require

if TYPE_CHECKING:
    from conadv_lab.config import Config

IMAGENET_IMAGES = 1_281_167
FIXED_MS, IMAGE_MS = 3.48, 0.1434


def step_ms(images: float, passes: float = 1.0) -> float:
    """Predicted milliseconds of a ResNet-50 step at 224 pixels of so many images on each H100.

    Args:
        images: of the global batch, a device.
        passes: gradient evaluations an image: 1 for vanilla, 8/3 for ConAdv with its attack on the same devices.

    >>> round(step_ms(400), 1)  # MLPerf: 57.07 on 8 devices
    60.8
    """
    return FIXED_MS + IMAGE_MS * images * passes


def run_minutes(batch: int, devices: int, epochs: float = 90, passes: float = 1.0) -> float:
    """Predicted minutes of a run over ImageNet.

    >>> round(run_minutes(32_768, 256), 1)
    1.3
    """
    return epochs * IMAGENET_IMAGES / batch * step_ms(batch / devices, passes) / 60_000


@dataclass(frozen=True)
class Plan:
    """What a step takes, on each device; bytes and images.

    Attributes:
        devices: how many share a step.
        images: clean images of a step a device.
        micro_batch: images of one forward.
        memory: bytes on the device by what they are for; with a CPU the same memory as ``host``.
        host: bytes of a process on the host.
        network: bytes that each device sends in a step.
        step_ms: predicted time on H100s; None for another model than ResNet-50 at 224 pixels.
    """

    devices: int
    images: float
    micro_batch: int
    memory: dict[str, int]
    host: dict[str, int]
    network: int
    step_ms: float | None

    def peak(self) -> int:
        """Bytes of a process that trains on the CPU."""
        return sum(self.memory.values()) + sum(self.host.values())

    def text(self) -> str:
        """The plan in lines, for a terminal."""
        batches = -(-round(self.images) // self.micro_batch)
        several = "es" if batches > 1 else ""
        lines = [
            f"predicted, not measured, for a step on {self.devices} device{'s'[: self.devices > 1]}:",
            f"images a device   {self.images:,.0f} clean, in {batches:,} micro-batch{several} of {self.micro_batch:,}",
            f"device memory     {_told(self.memory)}",
            f"host memory       {_told(self.host)}, a process",
            f"network           {self.network / 1e6:,.0f} MB sent by each device",
        ]
        time = (
            "no prediction for this model and image size"
            if self.step_ms is None
            else f"{self.step_ms:,.1f} ms"
        )
        return "\n".join([*lines, f"step              {time}" + (" on H100s" if self.step_ms else "")])


def _told(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 1e9:.2f} GB: {listed}"


def plan_of(config: "Config", devices: int = 1) -> Plan:
    """The plan of a config. It builds the model and sends two images through it, on the CPU; no data are read.

    Raises:
        ValueError: an impossible config, or more devices than images.
    """
    from conadv_lab.config import clean_batch, resolved
    from conadv_lab.footprint import host_bytes, memory_bytes
    from conadv_lab.methods import method_of

    config = resolved(config)
    clean = clean_batch(config)
    require(1 <= devices <= clean, "devices", devices, f"1 to {clean}, the clean images of a step")
    images = clean / devices
    micro_batch = min(config.training.micro_batch or clean, ceil(images))
    host = host_bytes(config)  # before the model is built here
    memory, parameters = memory_bytes(config, images, micro_batch, several=devices > 1)
    known = config.model.model == "resnet50" and (config.data.dataset, config.data.pixels) == (
        "imagenet",
        224,
    )
    # All-reduce of float32 gradients in a ring: each device sends 2 (n − 1) / n of them.
    network = round(2 * (devices - 1) / devices * 4 * parameters)
    passes = method_of(config).gradient_evaluations
    return Plan(
        devices,
        images,
        micro_batch,
        memory,
        host,
        network,
        step_ms(config.training.global_batch / devices, passes) if known else None,
    )
