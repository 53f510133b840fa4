"""One of two ranks that evaluate together: ``python -m tests.training.two_ranks FOLDER``."""

import json
import sys
from pathlib import Path

from conadv_lab.config import Config, resolved
from conadv_lab.recipes import digits
from conadv_lab.training import build, evaluate
from conadv_lab.training.distributed import Ranks, join
from tests.training import world

GROUP = 100


def config() -> Config:
    """898 images to learn from and 899 to be judged on, in evaluation batches of 100: 9 of each, an odd number."""
    return resolved(
        digits.vanilla().replace(
            model=f"{world.__file__}:network",
            global_batch=32,
            micro_batch=16,
            steps=2,
            warmup_epochs=0,
            threads=1,
            bn_recalibrate=898,
            pgd_images=50,
            mirror=True,
            crop=1,
            epsilon=0.05,
        )
    )


def judged(ranks: Ranks) -> dict:
    """The figures of an untrained network, its statistics, and how many images this rank took for each of the two."""
    build.EVALUATION_BATCH = evaluate.EVALUATION_BATCH = GROUP
    parts = build.build(config(), ranks)
    seen = [0]
    parts.model[0].register_forward_hook(lambda module, inputs, output: seen.append(seen.pop() + len(output)))
    model = evaluate.calibrated_copy(parts, parts.model)
    calibrated = seen.pop()
    seen.append(0)
    statistics = [values.tolist() for name, values in model.state_dict().items() if "main.running" in name]
    figures = evaluate.evaluate(parts, model)
    return {"figures": figures, "statistics": statistics, "images": [calibrated, seen.pop()]}


def main(folder: Path) -> None:
    ranks = join(config())
    (folder / f"judged-{ranks.number}.json").write_text(json.dumps(judged(ranks)))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
