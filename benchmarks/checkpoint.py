"""What saving costs a run: step times while a checkpoint is written, against the same steps without.

    python -m benchmarks.checkpoint [--json FILE] [--rounds N] [--model resnet18] [--batch N] [--threads N]

Model and optimiser state match the CIFAR recipe; a round has enough steps for the write to finish within it.
The last rows give the cost in percent of the training time at one checkpoint per minute.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import Options, Row, interleaved, publish
from benchmarks.step import our_run
from conadv_lab.cli import asked
from conadv_lab.training.loop import Run

MINUTE = 60.0


@dataclass(frozen=True)
class CheckpointOptions(Options):
    rounds: int = 7
    model: str = "resnet18"  # The model to train.
    batch: int = 32  # Images per step.
    threads: int = 1  # CPU threads.


def steps_while_saving(run: Run) -> int:
    """The number of steps that take at least twice as long as a checkpoint, from one warm-up of each."""
    for _ in range(2):
        run.train_step()
    start = time.perf_counter()
    run.train_step()
    step = time.perf_counter() - start
    start = time.perf_counter()
    run.save()
    run.saver.wait()
    return max(3, round(2 * (time.perf_counter() - start) / step))


def main() -> None:
    options = asked(CheckpointOptions, None, "benchmarks.checkpoint", __doc__)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run = our_run(options.model, "vanilla", options.batch, Path(scratch) / "run")
        torch.set_num_threads(options.threads)
        with run.saver:
            publish(measured(run, options.rounds), options.json)


def measured(run: Run, rounds: int) -> list[Row]:
    count = steps_while_saving(run)

    def steps() -> None:
        for _ in range(count):
            run.train_step()

    def beside() -> None:
        run.save()
        steps()
        run.saver.wait()

    def in_between() -> None:
        run.save()
        run.saver.wait()
        steps()

    calls = {f"{count} steps": steps, "with a checkpoint beside": beside, "with a pause to save": in_between}
    times = interleaved(calls, rounds, cuda=run.parts.device.type == "cuda")
    without, *saving = calls
    rows = [times.row(without), *(times.row(name, without) for name in saving)]
    for name in saving:
        pairs = zip(times.seconds[name], times.seconds[without], strict=True)
        extra = median(one - other for one, other in pairs)
        rows.append(Row(f"{name}, one a minute", 100 * extra / MINUTE, "% of training time"))
    return rows


if __name__ == "__main__":
    main()
