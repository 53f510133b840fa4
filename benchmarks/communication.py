"""How much of a step is spent waiting for other ranks, with 1 and 2 ranks on this machine.

    python -m benchmarks.communication [--json FILE] [--rounds N] [--ranks 1 2] [--model resnet18] [--batch N]

All train on the same global batch in two micro-batches. A rank waits when it has nothing to compute until a message
arrives; its own share of the reduction counts as waiting. The rows give rank 0's median step and wait.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Options, Row, from_ranks, publish
from conadv_lab.cli import asked
from conadv_lab.config import Config, resolved
from conadv_lab.mistakes import counted
from conadv_lab.recipes import digits

METHODS = ("vanilla", "conadv")
WARM_UP = 3


@dataclass(frozen=True)
class CommunicationOptions(Options):
    rounds: int = 9
    ranks: tuple[int, ...] = (1, 2)  # Numbers of ranks to compare.
    model: str = "resnet18"  # The model to train.
    batch: int = 32  # Images per step.
    child: str | None = None  # (A rank started by this command.)
    out: Path = Path(os.devnull)  # (Of a rank.)


class Waiting:
    """Seconds that this process spent waiting for messages alone, since the last call of `taken`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(dist, name, self._timed(getattr(dist, name)))

    def taken(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _timed(self, communicate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*tensors: Any, async_op: bool = False, **more: Any) -> Any:
            if async_op:
                return _Work(communicate(*tensors, async_op=True, **more), self)
            return self.during(lambda: communicate(*tensors, **more))

        return timed

    def during(self, wait: Callable[[], Any]) -> Any:
        self._computed()
        start = time.perf_counter()
        try:
            return wait()
        finally:
            self._computed()
            self.seconds += time.perf_counter() - start

    def _computed(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class _Work:
    """A pending operation whose wait is timed."""

    def __init__(self, work: Any, waiting: Waiting) -> None:
        self.work, self.waiting = work, waiting

    def wait(self) -> Any:
        return self.waiting.during(self.work.wait)

    def is_completed(self) -> bool:
        return self.work.is_completed()


def rank(model: str, method: str, batch: int, rounds: int, out: Path) -> None:
    """One rank: takes its steps; rank 0 writes the seconds of each step and of its waits."""
    from conadv_lab.runs import RunFolder
    from conadv_lab.training.build import build
    from conadv_lab.training.distributed import Spectator, join
    from conadv_lab.training.loop import Run

    base = digits.vanilla() if model == "digits-cnn" else Config().replace(dataset="synthetic")
    steps = 10**6
    config = base.replace(
        model=model, method=method, epsilon=0.01, global_batch=batch, micro_batch=batch // 2, steps=steps,
        warmup_epochs=0, log_every=steps, checkpoint_every=steps, threads=1,
    )  # fmt: skip
    ranks = join(config)
    folder = RunFolder(out / "run") if ranks.first else Spectator(out / "run")
    run = Run(build(resolved(config), ranks), folder, "none")
    waiting = Waiting(run.parts.device)
    taken: list[tuple[float, float]] = []
    with run.saver:
        run.start()
        for number in range(WARM_UP + rounds):
            waiting.taken()
            start = time.perf_counter()
            run.train_step()
            run.later.told(False, more=number + 1 < WARM_UP + rounds)
            if number >= WARM_UP:
                taken.append((time.perf_counter() - start, waiting.taken()))
    if ranks.first:
        (out / "found.json").write_text(json.dumps(taken))
    ranks.leave()


def measured(count: int, model: str, method: str, batch: int, rounds: int) -> tuple[float, float]:
    """(step in ms, its waits in percent) of rank 0 of ``count`` ranks."""
    taken = from_ranks(
        "benchmarks.communication", count, child=method, model=model, batch=batch, rounds=rounds
    )
    return 1e3 * median(step for step, _ in taken), 100 * median(wait / step for step, wait in taken)


def main() -> None:
    options = asked(CommunicationOptions, None, "benchmarks.communication", __doc__)
    if options.child:
        torch.set_num_threads(1)
        rank(options.model, options.child, options.batch, options.rounds, options.out)
        return
    rows = []
    for method in METHODS:
        one = None
        for count in options.ranks:
            step, share = measured(count, options.model, method, options.batch, options.rounds)
            name = f"{method}, {counted(count, 'rank')}"
            peer = f"{method}, {counted(options.ranks[0], 'rank')}"
            one = one or step
            rows += [
                Row(name, step, "ms a step", peer, step / one),
                Row(f"{name}, waiting", share, "% of a step"),
            ]
    publish(rows, options.json)


if __name__ == "__main__":
    main()
