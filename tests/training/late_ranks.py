"""Two ranks of which the last is late: ``python -m tests.training.late_ranks FOLDER PORT PORT``, one port a case."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from conadv_lab.config import Config
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.recipes import digits
from conadv_lab.training import distributed, loop

PATIENCE, LATE = 5, 8
SLOW_STEPS: dict[int, float] = {}


def config(**changes) -> Config:
    return digits.vanilla().replace(
        train_images=60, global_batch=20, micro_batch=10, steps=8, warmup_epochs=0, bn_recalibrate=0, threads=1,
        **changes,
    )  # fmt: skip


def slow(original):
    """The method of a class, which takes long at some of its calls on the last rank."""
    calls = iter(range(10**6))

    def late(*arguments, **more):
        call = next(calls)
        if os.environ["RANK"] == "1":
            time.sleep(SLOW_STEPS.get(call, 0.0))
        return original(*arguments, **more)

    return late


def meet(folder: Path, name: str) -> None:
    """Return once both are here: importing takes long where there is much else to do."""
    (folder / f"{name}-{os.environ['RANK']}").touch()
    while len(list(folder.glob(f"{name}-?"))) < 2:
        time.sleep(0.05)


def main(folder: Path, ports: list[str]) -> None:
    distributed.PATIENCE = loop.PATIENCE = timedelta(seconds=PATIENCE)
    cases = {
        # The attacker compiles its first attack, and the trainer waits for it.
        "attacker": (config(method="conadv", placement="ranks", attackers=1), {0: LATE}),
        # A trainer compiles its first step; and hangs in one in which there is nothing left to compile.
        "trainer": (config(), {0: LATE, 5: 600.0}),
    }
    for (name, (asked, steps)), port in zip(cases.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        SLOW_STEPS.clear()
        SLOW_STEPS.update(steps)
        Vanilla.backward = slow(Vanilla.backward)  # type: ignore[method-assign]
        SignAttack.perturb = slow(SignAttack.perturb)  # type: ignore[method-assign]
        meet(folder, name)
        try:
            loop.train(asked, folder / name, progress="none")
            end = "finished"
        except distributed.AnotherRankFailed as failure:
            end = str(failure)
        (folder / f"{name}-{os.environ['RANK']}.txt").write_text(end)
    os._exit(0)  # the world of the last case is broken


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
