"""How the ranks of a job find each other, through torchrun's environment variables; or starts them on this machine."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 120
GRACE = 15
"""Seconds the other ranks get to exit on their own once one has failed."""


def introduce(environment: Any, folder: Path) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, unless there is only one rank or all are set.

    A single inherited variable does not count: every rank would take itself for the only one.

    Rank 0 picks a free port and announces it to the others in a file in the run folder, so two jobs on one node
    never share a port. CUDA_VISIBLE_DEVICES stays as SLURM set it.

    Raises:
        TimeoutError: rank 0 announced no port within two minutes.
    """
    if environment.num_tasks == 1 or all(name in os.environ for name in MEETING):
        return
    attempt = f"{environment.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    meeting = folder / f"meeting-{attempt}.json"
    if environment.global_rank == 0:
        _announce(meeting)
    address, port = _wait_for(meeting)
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def part(folder: Path) -> None:
    """Delete the announced address: the next attempt of the same job must not look for rank 0 there."""
    for old in folder.glob("meeting-*.json"):
        old.unlink(missing_ok=True)


def start(command: Sequence[str], count: int) -> int:
    """Run the command as ``count`` ranks on this machine and return their exit status; if one dies, all end.

    Stop signals are passed on to every rank; a second INT kills them all. The status is that of the first rank that
    failed.
    """
    children: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, pass_on)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(_free_port("127.0.0.1"))
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In its own session a rank gets the terminal's Ctrl-C only once, from here.
            children.append(
                subprocess.Popen(
                    command,
                    env=os.environ | shared | own,
                    preexec_fn=_end_with_parent,
                    start_new_session=True,
                )
            )
        return _status_of(children)
    except KeyboardInterrupt:
        for child in children:
            child.kill()
            child.wait()
        return 128 + signal.SIGINT


def _status_of(children: list[subprocess.Popen]) -> int:
    """Wait for all ranks; after the first failure for at most `GRACE` seconds."""
    first: int | None = None
    until = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        failed = [rank for rank, child in enumerate(children) if child.poll()]
        if failed and first is None:
            first, until = failed[0], time.monotonic() + GRACE
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    failed = [rank for rank, child in enumerate(children) if child.returncode]
    if not failed:
        return 0
    first = failed[0] if first is None else first
    status = children[first].returncode
    if status < 0:
        print(f"error: rank {first} was killed by {signal.Signals(-status).name}", file=sys.stderr)
        return 1
    return status


def _end_with_parent() -> None:
    """Called in a child before it becomes a rank: have it killed when its parent dies, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _announce(meeting: Path) -> None:
    # srun starts on the first node, where rank 0 runs; its IP address needs no DNS.
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if address is None:
        address = "127.0.0.1" if os.environ.get("SUBMITIT_EXECUTOR") == "local" else socket.gethostname()
    port = _free_port("")
    part(meeting.parent)
    beside = meeting.with_suffix(".partial")
    beside.write_text(json.dumps([address, port]))
    beside.replace(meeting)


def _wait_for(meeting: Path) -> tuple[str, int]:
    until = time.monotonic() + PATIENCE
    while not meeting.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"rank 0 wrote no address to {meeting} within {PATIENCE} s")
        time.sleep(0.1)
    address, port = json.loads(meeting.read_text())
    return address, port


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
