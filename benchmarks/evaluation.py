"""How long an evaluation takes with 1 and 2 ranks on this machine, including re-estimating batch norm statistics.

    python -m benchmarks.evaluation [--json FILE] [--rounds N] [--ranks 1 2] [--model resnet20] [--images N]

Every rank has one thread, so two ranks need two idle cores. The rows give rank 0's median time; the ratio is the
speed-up over the first number of ranks. All must give the same results.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import Options, Row, from_ranks, publish
from conadv_lab.cli import asked
from conadv_lab.config import Config, resolved
from conadv_lab.mistakes import counted

GROUP = 500


@dataclass(frozen=True)
class EvaluationOptions(Options):
    rounds: int = 5
    ranks: tuple[int, ...] = (1, 2)  # Numbers of ranks to compare.
    model: str = "resnet20"  # The model to evaluate.
    images: int = 4000  # Training images to evaluate on.
    child: bool = False  # (A rank started by this command.)
    out: Path = Path(os.devnull)  # (Of a rank.)


def rank(model: str, images: int, rounds: int, out: Path) -> None:
    """One rank: evaluates; rank 0 writes the seconds of each evaluation and the results."""
    from conadv_lab.training.build import build
    from conadv_lab.training.distributed import join
    from conadv_lab.training.evaluate import calibrated_copy, evaluate

    config = Config().replace(
        dataset="synthetic", synthetic_images=images, model=model, global_batch=GROUP, micro_batch=GROUP // 4,
        steps=10, warmup_epochs=0, bn_recalibrate=images, threads=1,
    )  # fmt: skip
    ranks = join(config)
    parts = build(resolved(config), ranks)
    seconds, figures = [], {}
    for _ in range(rounds + 1):
        ranks.wait()
        start = time.perf_counter()
        figures = evaluate(parts, calibrated_copy(parts, parts.model), images)
        seconds.append(time.perf_counter() - start)
    if ranks.first:
        (out / "found.json").write_text(json.dumps({"seconds": seconds[1:], "figures": figures}))
    ranks.leave()


def main() -> None:
    options = asked(EvaluationOptions, None, "benchmarks.evaluation", __doc__)
    if options.child:
        torch.set_num_threads(1)
        rank(options.model, options.images, options.rounds, options.out)
        return
    asked_for = {"model": options.model, "images": options.images, "rounds": options.rounds}
    found = {n: from_ranks("benchmarks.evaluation", n, "--child", **asked_for) for n in options.ranks}
    first = found[options.ranks[0]]
    rows = []
    for count, own in found.items():
        if own["figures"] != first["figures"]:
            raise RuntimeError(
                f"{count} ranks give {own['figures']}, and {options.ranks[0]} {first['figures']}"
            )
        name, peer = (counted(number, "rank") for number in (count, options.ranks[0]))
        rows.append(Row(name, median(own["seconds"]), "s an evaluation", peer,
                        median(first["seconds"]) / median(own["seconds"])))  # fmt: skip
    publish(rows, options.json)


if __name__ == "__main__":
    main()
