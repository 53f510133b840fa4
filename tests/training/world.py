"""One rank of a world that trains many cases one after another: ``python -m tests.training.world FILE``.

FILE is JSON: a list of {"out", "config", "resume"}. Starting a rank takes seconds, so that each world is started once.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conadv_lab.config import Config


@dataclass
class World:
    """Ranks that run in the background; their cases' folders are complete once `wait` has returned."""

    ranks: list[subprocess.Popen]

    def wait(self) -> None:
        said = [rank.communicate(timeout=240)[0] for rank in self.ranks]
        assert [rank.returncode for rank in self.ranks] == [0] * len(self.ranks), "\n".join(said)


def started(count: int, cases: list[dict[str, Any]], folder: Path) -> World:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"cases-of-{count}.json"
    file.write_text(json.dumps(cases))
    return World(processes([sys.executable, "-m", "tests.training.world", str(file)], count))


def processes(command: list[str], count: int, **more: str) -> list[subprocess.Popen]:
    """The command as ``count`` ranks, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def case(out: Path, config: Config, resume: bool = False) -> dict[str, Any]:
    return {"out": str(out), "config": config.to_dict(), "resume": resume}


def network(_config: Config):
    """Two convolutions with batch norm for the digits: small, as hundreds of steps are taken with it."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 10),
    )


def main() -> None:
    import torch.distributed as dist

    from conadv_lab.training.loop import train

    dist.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(Config.from_dict(one["config"]), one["out"], resume=one["resume"], progress="none")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
