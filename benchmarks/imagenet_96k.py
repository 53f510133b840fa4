"""One ConAdv step of ResNet-50 at batch 98,304 on the CPU, and its peak memory against the plan's prediction.

    python -m benchmarks.imagenet_96k [--json FILE] [--batch N] [--micro-batch N] [--threads N]

Images are synthetic and 32 × 32 pixels; only the batch is full size. Run it by hand, never in CI: about 25 minutes on
one idle core, 30 on a busy machine. ``--batch 2048`` takes less than a minute and uses the same memory except for the
pending signs, one bit per value.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import Options, Row, publish
from conadv_lab.cli import asked
from conadv_lab.config import Config, resolved
from conadv_lab.footprint import resident_bytes
from conadv_lab.plan import plan_of

BATCH, MICRO_BATCH = 98_304, 256


@dataclass(frozen=True)
class LargeBatchOptions(Options):
    batch: int = BATCH  # Global batch.
    micro_batch: int = MICRO_BATCH  # Images per forward pass.
    threads: int | None = None  # CPU threads; None: all cores.
    child: bool = False  # (The process started by this command.)


def config_of(batch: int, micro_batch: int, threads: int | None) -> Config:
    return Config().replace(
        dataset="synthetic",
        synthetic_images=BATCH,
        synthetic_pixels=32,
        model="resnet50",
        method="conadv",
        optimizer="lars",
        lars_variant="C",
        base_lr=4.0,
        base_batch=512,
        lr_rule="sqrt",
        global_batch=batch,
        micro_batch=min(batch, micro_batch),
        steps=1,
        bn_recalibrate=0,
        device="cpu",
        threads=threads,
    )


def child(config: Config) -> None:
    """Take the step in this process and print seconds, loss and peak in MB."""
    from conadv_lab.runs import RunFolder
    from conadv_lab.training.build import build
    from conadv_lab.training.loop import Run

    with tempfile.TemporaryDirectory() as scratch:
        run = Run(build(resolved(config)), RunFolder(Path(scratch) / "run"), "none")
        run.start()
        for group in run.parts.optimizer.param_groups:  # momentum buffers exist in every step but the first
            for param in group["params"]:
                run.parts.optimizer.state[param]["velocity"] = torch.empty_like(param).zero_()
        start = time.perf_counter()
        run.train_step()
        seconds = time.perf_counter() - start
        loss = run.folder.metrics()[-1]["adversarial_loss"]
    print(json.dumps([seconds, loss, resident_bytes(peak=True) / 1e6]))


def measured(words: list[str]) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "benchmarks.imagenet_96k", "--child", *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, loss, peak = json.loads(output.splitlines()[-1])
    return seconds, loss, peak


def main() -> None:
    options = asked(LargeBatchOptions, None, "benchmarks.imagenet_96k", __doc__)
    config = config_of(options.batch, options.micro_batch, options.threads)
    if options.child:
        child(config)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = plan_of(config)
    words = ["--batch", str(options.batch), "--micro-batch", str(options.micro_batch)]
    seconds, loss, peak = measured(words + (["--threads", str(options.threads)] if options.threads else []))
    predicted = plan.peak() / 1e6
    publish(
        [
            Row("step", seconds, "s"),
            Row("adversarial loss", loss, "nats"),
            Row("predicted peak", predicted, "MB"),
            Row("peak", peak, "MB", "predicted peak", peak / predicted),
        ],
        options.json,
    )
    print(plan.text())


if __name__ == "__main__":
    main()
