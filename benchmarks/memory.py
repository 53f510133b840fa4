"""Peak memory of ConAdv on a CPU at batch 98,304 against batch 1,024, with the same micro-batch.

    python -m benchmarks.memory [--json FILE] [--staleness τ]

Each batch runs in its own process, which reports its peak memory.
"""

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.harness import Options, Row, publish
from conadv_lab.cli import asked

LARGE, SMALL, MICRO = 98_304, 1_024, 256
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class MemoryOptions(Options):
    staleness: int = 1  # ConAdv's τ.
    child: int | None = None  # (The batch of a process started by this command.)


def small_network(_config: object) -> nn.Module:
    """A network with batch norm whose step takes seconds at batch 98,304."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def peak_megabytes(batch: int, staleness: int) -> float:
    """Peak memory of a process that takes τ + 2 ConAdv steps of ``batch`` images."""
    words = ["--child", str(batch), "--staleness", str(staleness)]
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words], check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def child(batch: int, staleness: int) -> None:
    from conadv_lab.config import Config
    from conadv_lab.training.loop import train

    config = Config().replace(
        dataset="synthetic",
        synthetic_images=LARGE,
        model=f"{__file__}:small_network",
        method="conadv",
        staleness=staleness,
        global_batch=batch,
        micro_batch=MICRO,
        steps=staleness + 2,
        checkpoint_every=1_000,
        bn_recalibrate=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        train(config, Path(scratch) / "run", progress="none")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def main() -> None:
    options = asked(MemoryOptions, None, "benchmarks.memory", __doc__)
    if options.child:
        child(options.child, options.staleness)
        return
    small, large = (peak_megabytes(batch, options.staleness) for batch in (SMALL, LARGE))
    tau = options.staleness
    allowed = 1.3 * small + tau * LARGE * PIXELS / 8 / 1e6 + (1 + tau) * LARGE * PIXELS / 1e6
    publish(
        [
            Row(f"batch {SMALL}", small, "MB"),
            Row(f"batch {LARGE}", large, "MB", f"batch {SMALL}", large / small),
            Row("allowed", allowed, "MB", f"batch {SMALL}", allowed / small),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
