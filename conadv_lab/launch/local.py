"""Runs on this machine, through submitit's local executor, a few at a time, until all are done."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import submitit

from conadv_lab.launch.profiles import Profile
from conadv_lab.launch.slurm import environment_lines, python_words
from conadv_lab.launch.worker import work


def python(profile: Profile, code: Path) -> str:
    """The command that starts Python for a run, in the environment that it needs."""
    lines = [*profile.setup, *environment_lines(code)]
    if profile.gpus_per_node is None:  # submitit would hide all GPUs
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        lines.append(
            "unset CUDA_VISIBLE_DEVICES"
            if seen is None
            else f"export CUDA_VISIBLE_DEVICES={shlex.quote(seen)}"
        )
    lines.append(f'exec {python_words(profile)} "$@"')
    # submitit starts its command without a shell, and with its own setup lines it loses the process id.
    return f"bash -c {shlex.quote(' && '.join(lines))} run"


def run_all(
    profile: Profile, jobs: Path, code: Path, paths: Sequence[Path], sent: Callable[[Path, str], None]
) -> None:
    """Run the folders ``paths``, at most ``max_parallel`` at a time; returns when all have ended.

    ``sent`` is called with each folder and its job id, which is the process id, once it runs. Ctrl-C tells the running
    ones to save and stop, waits for them, and starts no more.
    """
    made = submitit.LocalExecutor(jobs, python=python(profile, code))
    made.update_parameters(
        tasks_per_node=profile.tasks_per_node,
        gpus_per_node=profile.gpus_per_node or 0,
        timeout_min=profile.minutes,
        signal_delay_s=profile.delay,
    )
    waiting: list[Path] = list(paths)
    running: list[tuple[Path, Any, float]] = []
    ended = 0
    try:
        while waiting or running:
            while waiting and len(running) < profile.max_parallel:
                path = waiting.pop(0)
                with _deaf_to_interrupts():
                    job = made.submit(work, str(path))
                sent(path, job.job_id)
                running.append((path, job, time.monotonic()))
                _tell(f"started {path.name}; follow it with: python -m conadv_lab.submit status {path}")
            for one in [one for one in running if one[1].done()]:
                running.remove(one)
                ended += 1
                _tell(
                    f"ended {one[0].name} after {time.monotonic() - one[2]:.0f} s ({ended} of {len(paths)})"
                )
            time.sleep(0.1)
    except KeyboardInterrupt:
        for _, job, _ in running:
            job._process.send_signal(signal.SIGTERM)  # the controller hands it on to the ranks
        for _, job, _ in running:
            job._process.wait()
        raise


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cancel(process: int) -> None:
    """Tell a run's controller to save and stop; one that has already ended is ignored."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def is_alive(process: int, jobs: Path) -> bool:
    """Whether this process is still the controller of a run below ``jobs``, and not a later one with the same id."""
    shown = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(process)], capture_output=True, text=True, check=False
    ).stdout
    return "submitit.local._local" in shown and str(jobs) in shown and not shown.startswith("Z")


@contextmanager
def _deaf_to_interrupts() -> Any:
    """Processes started inside ignore the terminal's Ctrl-C, which would kill submitit's controller at once."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
