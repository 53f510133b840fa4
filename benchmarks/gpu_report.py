"""What the GPU benchmark computes from its times: rates, shares of the peak, tables and rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.harness import Row, Times

PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}
"""Dense bfloat16 TFLOP/s by torch's name of the GPU; for other GPUs no share is given.

From NVIDIA's data sheets, as quoted by others: A100 312, 624 with sparsity (1758950-r4, quoted for SXM by
glennklockwood.com/garden/processors/A100; the PCIe cards have the same cores and clock). Of Hopper they give the rate
with sparsity, twice the dense one: H100 SXM 1,979 and PCIe 1,513 (NVIDIA's table, quoted by
archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html), H200 what H100 SXM has (quoted by
glennklockwood.com/garden/processors/h100)."""
STEP_GFLOP = {("resnet50", 224): 24.5}
"""10⁹ floating-point operations per image in a vanilla training step: three passes of 4.09 G multiply-adds
(torchvision's documentation), two operations each."""


DASH = "–"


@dataclass(frozen=True)
class Measured:
    """One kind of step at one batch size.

    Attributes:
        label: method and placement.
        batch: images per step.
        ms: median step time.
        ratio, spread: step time relative to vanilla, median and quartiles over the rounds' pairs.
        memory: peak memory reserved by torch in GiB, or None.
        share: percent of the GPU's peak rate, or None.
        over_disadv: DisAdv's step time over this one's, both captured or both not, median over pairs, or None.
    """

    label: str
    batch: int
    ms: float
    ratio: float
    spread: tuple[float, float] | None
    memory: float | None
    share: float | None
    over_disadv: float | None

    @classmethod
    def of(
        cls,
        label: str,
        batch: int,
        times: Times,
        memory: float | None,
        evaluations: float,
        gflop: float | None,
        peak: float | None,
    ) -> "Measured":
        row = times.row(label, "vanilla")
        assert row.ratio is not None
        share = None
        if gflop is not None and peak is not None:
            share = 100 * gflop * evaluations * batch / (row.value * peak)  # GFLOP per ms equal TFLOP per s
        rival = "disadv" + label.partition(", ")[1] + label.partition(", ")[2].partition(", ")[0]
        over = times.row(rival, label).ratio if rival in times.seconds else None
        return cls(label, batch, row.value, row.ratio, row.spread, memory, share, over)


def peak_tflops() -> float | None:
    """The peak rate of this GPU, or None if its data sheet is not listed."""
    return PEAK_TFLOPS.get(torch.cuda.get_device_name())


def images_per_second(times: Times, batch: int, own: Sequence[str]) -> list[Row]:
    """One row per loop; the ratio is its rate over the rate of the fastest loop outside ``own``."""
    fastest = min((name for name in times.seconds if name not in own), key=times.median)
    rows = []
    for name, seconds in times.seconds.items():
        pairs = zip(times.seconds[fastest], seconds, strict=True)
        rate = batch / times.median(name)
        ratio = median(theirs / ours for theirs, ours in pairs)
        rows.append(Row(f"rate of {name}, {batch} images", rate, "images/s", fastest, ratio))
    return rows


def rows_of(steps: Sequence[Measured]) -> list[Row]:
    """Step times relative to vanilla, DisAdv's time over ConAdv's, memory, and shares of the peak rate."""
    rows = []
    for one in steps:
        name = f"{one.label}, {one.batch} images"
        rows.append(Row(name, one.ms, "ms", "vanilla", one.ratio, one.spread))
        if one.label.startswith("conadv") and one.over_disadv is not None:
            rows.append(Row(f"disadv / {name}", one.over_disadv, "1"))
        if one.memory is not None:
            rows.append(Row(f"{name}, memory", one.memory, "GiB"))
        if one.share is not None:
            rows.append(Row(f"{name}, of the peak rate", one.share, "%"))
    return rows


def tables(steps: Sequence[Measured]) -> str:
    """One table per quantity: a row per kind of step, a column per batch size."""
    shown: dict[str, Callable[[Measured], str]] = {
        "ms a step": lambda one: f"{one.ms:.2f}",
        "times vanilla": lambda one: f"{one.ratio:.3f}",
        "DisAdv's time over it": lambda one: _or_dash(one.over_disadv, ".3f"),
        "GiB reserved at most": lambda one: _or_dash(one.memory, ".2f"),
        "% of the peak rate": lambda one: _or_dash(one.share, ".1f"),
    }
    known = {title: show for title, show in shown.items() if any(show(one) != DASH for one in steps)}
    return "\n\n".join(_table(title, steps, show) for title, show in known.items())


def _table(title: str, steps: Sequence[Measured], shown: Callable[[Measured], str]) -> str:
    batches = list(dict.fromkeys(one.batch for one in steps))
    cells = {(one.label, one.batch): shown(one) for one in steps}
    labels = list(dict.fromkeys(one.label for one in steps))
    width = max([len(title), *map(len, labels)])
    lines = [f"{title:<{width}}" + "".join(f"{batch:>10}" for batch in batches)]
    for label in labels:
        lines.append(f"{label:<{width}}" + "".join(f"{cells.get((label, b), DASH):>10}" for b in batches))
    return "\n".join(lines)


def _or_dash(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)
