"""Shared by all benchmarks: fair timing, a description of the machine, one table and one JSON format."""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from conadv_lab.cores import cores
from conadv_lab.files import write_json
from conadv_lab.mistakes import require

GPU_REPEATS = 4
"""Calls per timing on a GPU, so that the host runs ahead of it."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        value: the measured value.
        unit: its unit, such as "ms".
        peer: name of what it is compared with, or None.
        ratio: value over the peer's value unless the benchmark says otherwise, or None.
        spread: lower and upper quartile of the ratio; shown in the table.
    """

    name: str
    value: float
    unit: str
    peer: str | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Options:
    """Options of every benchmark; a subclass adds its own, and the comment after an option is its help."""

    json: Path | None = None
    """Also write the results to this file."""
    rounds: int = 1
    """Timed rounds."""


class Times:
    """Seconds of each named callable, round by round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self.seconds = seconds

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.seconds[name])

    def row(self, name: str, peer: str | None = None) -> Row:
        """One callable's row in ms; its ratio is the median over the rounds' pairs with the peer."""
        value = 1e3 * self.median(name)
        if peer is None:
            return Row(name, value, "ms")
        ratios = [ours / theirs for ours, theirs in zip(self.seconds[name], self.seconds[peer], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        return Row(name, value, "ms", peer, middle, (low, high))


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    cuda: bool = False,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time named callables in turn, round after round, so that a varying load on the machine affects all alike.

    The order is reversed in every second round, so no callable always runs after the same neighbour.

    Args:
        calls: what to time; each is called once beforehand, untimed.
        rounds: timings of each, at least 2.
        cuda: wait for the GPU before and after each timing.
        repeats: calls per timing, by which its time is divided; with one call the host cannot run ahead of a GPU.
        clock: returns seconds; ``time.process_time`` leaves out the time that other processes take.
    """
    require(rounds >= 2, "rounds", rounds, "a whole number of at least 2")
    wait = torch.cuda.synchronize if cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            wait()
            start = clock()
            for _ in range(repeats):
                calls[name]()
            wait()
            seconds[name].append((clock() - start) / repeats)
    return Times(seconds)


def from_ranks(module: str, count: int, *flags: str, **options: Any) -> Any:
    """Run a benchmark with ``count`` ranks; returns what rank 0 writes to ``found.json`` in its folder ``--out``."""
    from conadv_lab.launch.ranks import start

    with tempfile.TemporaryDirectory() as scratch:
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", module, *flags, *words, f"--out={scratch}"]
        status = start(command, count) if count > 1 else subprocess.run(command, check=False).returncode
        if status:
            raise RuntimeError(f"the ranks ended with status {status}")
        return json.loads((Path(scratch) / "found.json").read_text())


def machine() -> dict[str, Any]:
    """A description of the machine: processor, cores and threads used, torch, and GPU and driver if there is one."""
    described: dict[str, Any] = {
        "cpu": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver()}
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    """Version of NVIDIA's driver, from the kernel module or else from nvidia-smi."""
    told = Path("/proc/driver/nvidia/version")
    if told.exists():
        text = told.read_text()
    else:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


def publish(rows: Sequence[Row], json_file: Path | None = None) -> None:
    """Print the rows as a table and, with ``--json``, write them to a file."""
    print(in_words(machine()))
    width = max(len(row.name) for row in rows)
    for row in rows:
        line = f"{row.name:<{width}}  {row.value:>10.3f} {row.unit}"
        if row.peer is not None and row.ratio is not None:
            spread = f" ({row.spread[0]:.3f}–{row.spread[1]:.3f})" if row.spread else ""
            line += f"   {row.ratio:.3f}{spread} × {row.peer}"
        print(line)
    if json_file is not None:
        write(rows, json_file)


def in_words(described: Mapping[str, Any]) -> str:
    """`machine`'s description in one line."""
    return " · ".join(f"{key} {value}" for key, value in described.items())


def write(rows: Sequence[Row], json_file: Path) -> None:
    """Write the machine and the rows as JSON, atomically."""
    kept = ("name", "value", "unit", "peer", "ratio")
    plain = [{key: asdict(row)[key] for key in kept} for row in rows]
    write_json(json_file, {"machine": machine(), "rows": plain})
