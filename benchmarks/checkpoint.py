"""What saving costs a run: steps with a checkpoint written beside them, against the same steps without.

    python -m benchmarks.checkpoint [--json FILE] [--rounds N] [--model resnet18] [--batch N] [--threads N]

The model and the optimiser's state are those of the CIFAR recipe; a round takes so many steps that the writing ends
within it. The last rows give the price in percent of the training time at one checkpoint a minute.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import Row, arguments, interleaved, publish
from benchmarks.step import our_run
from conadv_lab.training.loop import Run

MINUTE = 60.0


def steps_while_saving(run: Run) -> int:
    """How many steps take at least twice as long as a checkpoint; both are done once before."""
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
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
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
