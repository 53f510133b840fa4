"""One rank of a world that trains many cases one after another: ``python -m tests.training.world FILE``.

FILE is JSON: a list of cases. Starting a rank takes seconds, so that each world is started once.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conadv_lab.config import Config


class Killed(BaseException):
    """Stands for a kill of all ranks: nothing in the package may catch it."""


@dataclass
class World:
    """Ranks that run in the background; their cases' folders are complete once `wait` has returned."""

    ranks: list[subprocess.Popen]

    def wait(self) -> list[int]:
        """Exit statuses of all ranks."""
        said = [rank.communicate(timeout=600)[0] for rank in self.ranks]
        if any(rank.returncode > 0 for rank in self.ranks):
            pytest.fail("\n".join(said))
        return [rank.returncode for rank in self.ranks]


def started(count: int, cases: list[dict[str, Any]], folder: Path) -> World:
    file = folder / f"cases-of-{count}.json"
    file.write_text(json.dumps(cases))
    return World(processes([sys.executable, "-m", "tests.training.world", str(file)], count))


def processes(command: list[str], count: int) -> list[subprocess.Popen]:
    """The command as ``count`` ranks, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def case(out: Path, config: Config, **disturbance: int) -> dict[str, Any]:
    """A run to train, or to continue where the folder is there already.

    Args:
        out: the run folder.
        config: its config.
        disturbance: before which step all are killed (``killed``), or the last rank alone by a real KILL
            (``died``), or gets USR2 (``signalled``), or rank 0 finds the disk full (``full``); or, with ``blind``,
            that the last rank alone sees no GPU.
    """
    return {"out": str(out), "config": config.to_dict(), "disturbance": disturbance}


def ended(out: Path, rank: int) -> str:
    """How a case ended on a rank that was disturbed."""
    return out.with_name(f"{out.name}-{rank}.txt").read_text()


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


def strangers_loop(out: Path) -> None:
    """Somebody else's training over ranks with DistributedDataParallel, each rank with a loader of its own."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from conadv_lab.data.lookahead import lookahead
    from conadv_lab.models.norm import share_statistics

    model, method, optimizer = strangers_parts()
    share_statistics(model, dist.group.WORLD)
    network = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    loader = strangers_batches(dist.get_rank())
    for step in lookahead(loader, steps=12, ahead=method.lookahead):
        method.backward(network, step, torch.nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), out)


def strangers_parts():
    import torch

    from conadv_lab.methods.attack import SignAttack
    from conadv_lab.methods.families.conadv import ConAdv
    from conadv_lab.models.norm import mixture_batch_norm

    torch.manual_seed(0)
    model = mixture_batch_norm(network(Config())).double()
    return (
        model,
        ConAdv(SignAttack(0.1), staleness=2),
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
    )


def strangers_batches(rank: int) -> list:
    import torch

    draw = torch.Generator().manual_seed(rank)
    return [
        (
            torch.rand(8, 1, 8, 8, generator=draw, dtype=torch.float64),
            torch.randint(0, 10, (8,), generator=draw),
        )
        for _ in range(5)
    ]


def settle(run: Any) -> None:
    """Let messages arrive that are under way: a killed process takes its own along, but here the next run of the same
    process listens on the same connections, and for messages of the same numbers."""
    method = run.parts.method
    method.state_dict()  # waits for every perturbation that is expected
    for work, _ in getattr(getattr(method, "placement", None), "sending", []):
        work.wait()


def disturb(run: Any, step: int, disturbance: dict[str, int]) -> None:
    last = run.ranks.number == run.ranks.count - 1
    if disturbance.get("killed") == step:
        settle(run)
        raise Killed
    if disturbance.get("died") == step and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if disturbance.get("signalled") == step and last:
        os.kill(os.getpid(), signal.SIGUSR2)
    if disturbance.get("full") == step and run.ranks.first:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main() -> None:
    import torch.distributed as dist

    from conadv_lab.training import build, loop
    from conadv_lab.training.distributed import AnotherRankFailed
    from conadv_lab.training.finite import NotFinite
    from tests.elsewhere import elsewhere

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    original, disturbance = loop.Run.train_step, {}

    def disturbed_step(run: Any) -> None:
        disturb(run, run.step, disturbance)
        original(run)

    def disturbed_pick(name: str, ranks: Any) -> Any:
        if "blind" in disturbance and ranks.number == ranks.count - 1:
            raise ValueError("this node has no GPU")
        return pick(name, ranks)

    pick, build.pick_device = build.pick_device, disturbed_pick
    loop.Run.train_step = disturbed_step  # type: ignore[method-assign]
    strangers_loop(Path(sys.argv[1]).with_name(f"strangers-{dist.get_world_size()}.pt"))
    for one in json.loads(Path(sys.argv[1]).read_text()):
        disturbance, out = one["disturbance"], Path(one["out"])
        config = Config.from_dict(one["config"])
        try:
            with elsewhere():  # of all that ranks say to one another nothing may rest on the default device
                loop.train(config, out, resume=True, progress="none")
        except (Killed, ValueError, loop.StoppedOnRequest, NotFinite, OSError, AnotherRankFailed) as end:
            out.with_name(f"{out.name}-{rank}.txt").write_text(f"{type(end).__name__}: {end}")
            if isinstance(end, (OSError, AnotherRankFailed)):
                os._exit(0)  # the world is broken


if __name__ == "__main__":
    main()
