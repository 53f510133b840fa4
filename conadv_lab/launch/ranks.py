"""The ranks of a job get to know one another, in the words of torchrun's environment."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

PATIENCE = 120


def introduce(environment: Any, folder: Path) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, unless there is one rank or they are set.

    Rank 0 looks for a free port and tells the others in a file of the run's, so that two jobs on a node never
    meet on one port. CUDA_VISIBLE_DEVICES stays as SLURM set it.

    Raises:
        TimeoutError: rank 0 told no port within two minutes.
    """
    if environment.num_tasks == 1 or "MASTER_PORT" in os.environ:
        return
    stretch = f"{environment.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    meeting = folder / f"meeting-{stretch}.json"
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


def _announce(meeting: Path) -> None:
    # The node that srun was started on is the first, which rank 0 runs on; its number needs no name server.
    address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if address is None:
        address = "127.0.0.1" if os.environ.get("SUBMITIT_EXECUTOR") == "local" else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    for old in meeting.parent.glob("meeting-*.json"):
        old.unlink(missing_ok=True)
    beside = meeting.with_suffix(".partial")
    beside.write_text(json.dumps([address, port]))
    beside.replace(meeting)


def _wait_for(meeting: Path) -> tuple[str, int]:
    until = time.monotonic() + PATIENCE
    while not meeting.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"rank 0 told no address in {meeting} within {PATIENCE} s")
        time.sleep(0.1)
    address, port = json.loads(meeting.read_text())
    return address, port
