"""One of two ranks whose steps are recorded and replayed, case by case: ``python -m tests.capture.ranks FOLDER``.

The ranks are those of a run on two GPUs, but for the graphs: each rank records its operators on a CPU instead, and what
lies between two graphs is a real message. So the package is told that nothing speaks against graphs here.
"""

import json
import os
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from conadv_lab.capture import choice
from conadv_lab.capture.replays import WARM, CannotCapture, Replays
from conadv_lab.config import Config
from conadv_lab.methods.weight_space import WeightSpace
from conadv_lab.optim import sgd
from conadv_lab.runs import RunFolder
from conadv_lab.training import loop
from conadv_lab.training.distributed import AnotherRankFailed
from conadv_lab.training.stopping import StoppedOnRequest
from tests.capture.recording import Listening, Recordings

STOP = 15
"""After which step a run stops that will be continued: adversarial statistics are warm, and steps replayed."""


class TooSmall(Recordings):
    """A GPU that holds no graph."""

    def capture(self, part: Any) -> Any:
        raise CannotCapture("there is not enough GPU memory for a captured step")


class Rank:
    """What a case does on this rank; ``backends``: all that its runs had."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.backends: list[Recordings] = []
        self.reason: str | None = None
        self.backend: type[Recordings] = Recordings
        choice.CudaGraphs = self._recordings  # type: ignore[misc, assignment]
        loop.reason_against = lambda *_, **__: self.reason  # type: ignore[assignment]
        sgd.all_on_gpu = lambda _: True  # type: ignore[assignment]
        WeightSpace._require_finite = lambda *_: None  # type: ignore[method-assign, assignment]

    def _recordings(self, _device: torch.device) -> Recordings:
        self.backends.append(self.backend())
        return self.backends[-1]

    def prepared(self, config: Config, name: str) -> loop.Run:
        run = loop.prepare(config, self.folder / name, resume=True, progress="none")
        assert run is not None
        assert run.feed is not None
        run.program.rates = run.feed.block.rates  # on the device, as on a GPU
        return run

    def trained(self, config: Config, name: str) -> loop.Run:
        run = self.prepared(config, name)
        run.to_the_end()
        return run

    def stopped(self, config: Config, name: str) -> None:
        """A run that the last rank is asked to stop."""
        run = self.prepared(config, name)
        original = run.train_step

        def train_step() -> None:
            if run.step == STOP - 2 and self.number:
                os.kill(os.getpid(), signal.SIGUSR2)
            original()

        run.train_step = train_step  # type: ignore[method-assign]
        try:
            run.to_the_end()
        except StoppedOnRequest:
            return
        raise AssertionError("nobody stopped")

    def operators(self, config: Config, name: str) -> tuple[list, list]:
        """What two successive steps of a kind run, segment by segment."""
        run = self.prepared(config.replace(capture="on"), name)
        with run.claim, run.saver:
            run.start()
            while run.step < STOP:
                run.train_step()
            listening = Listening()
            run.program.replays = Replays(listening)
            for _ in range(2):
                run.train_step()
        first, second = (one.signature() for one in listening.recordings)
        return first, second

    def case(self, name: str, config: Config) -> dict[str, Any]:
        """A run that is captured, one that is stopped and goes on, and one that is not captured."""
        eager = self.trained(config.replace(capture="off"), f"{name}-eager")
        run = self.trained(config, name)
        backend = self.backends[-1]
        self.stopped(config, f"{name}-again")
        again = self.trained(config, f"{name}-again")
        first, second = self.operators(config, f"{name}-operators")
        return {
            "overlaps": [eager.overlaps, run.overlaps],
            "captured": backend.captured, "replayed": [backend.replayed, self.backends[-2].replayed],
            "differ": [differing(eager, run), differing(eager, again)],
            "segments": len(first), "operators": sum(map(len, first)),
            "unlike": [str(pair) for pair in zip(chain(*first), chain(*second), strict=True) if pair[0] != pair[1]],
        }  # fmt: skip

    def fallback(self, name: str, config: Config, own: dict[str, Any]) -> dict[str, Any]:
        """A run of which rank 1 alone has these attributes of ours."""
        kept = {key: getattr(self, key) for key in own}
        eager = self.trained(config.replace(capture="off"), f"{name}-eager")
        try:
            for key, value in own.items():
                setattr(self, key, value if self.number else kept[key])
            known = len(self.backends)
            try:
                run = self.trained(config, name)
            except ValueError as mistake:
                return {"said": str(mistake), "exists": (self.folder / name).exists()}
            made = self.backends[known:]
            return {
                "captures": run.program.captures, "overlaps": run.overlaps, "differ": differing(eager, run),
                "replayed": [one.replayed for one in made],
            }  # fmt: skip
        finally:
            for key, value in kept.items():
                setattr(self, key, value)


def differing(one: loop.Run, other: loop.Run) -> list[str]:
    """Names of the tensors and figures that are not the same to the bit."""
    mine, theirs = one.parts.model.state_dict(), other.parts.model.state_dict()
    names = [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
    lines = [
        [(line["step"], line["loss"]) for line in RunFolder(run.folder.path).metrics()]
        for run in (one, other)
    ]
    return names + ["losses"] * (lines[0] != lines[1])


def main(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = Rank(folder, dist.get_rank())
    found: dict[str, Any] = {"warm": WARM}
    for one in json.loads((folder / "cases.json").read_text()):
        name, config = one["name"], Config.from_dict(one["config"])
        if one["kind"] == "case":
            found[name] = rank.case(name, config)
            continue
        own = dict(one["own"])
        if "backend" in own:
            own["backend"] = TooSmall
        try:
            found[name] = rank.fallback(name, config, own)
        except AnotherRankFailed as failure:
            found[name] = {"failed": str(failure)}
        (folder / f"found-{rank.number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
