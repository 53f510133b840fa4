"""A stand-in for SLURM's commands, and the real cluster where one runs."""

import fcntl
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conadv_lab import submit
from conadv_lab.launch import slurm
from conadv_lab.launch.records import Record
from conadv_lab.launch.status import State, states

# Steps that take a known time, so that a test can disturb a run in its middle; and one that eats memory.
OWN = '''
import os
import pathlib
import time
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.steps import train_on_clean
from conadv_lab.recipes.digits import vanilla

def recipe():
    """Slow."""
    return vanilla().replace(method=f"{__file__}:slow", train_images=40, global_batch=20, steps=90,
                             warmup_epochs=0, bn_recalibrate=0, log_every=1, checkpoint_every=10, threads=1)

def greedy_recipe():
    """Greedy."""
    return recipe().replace(method=f"{__file__}:greedy", checkpoint_every=3)

class Slow(Method):
    def backward(self, model, step, criterion):
        time.sleep(0.05)
        return Losses(train_on_clean(model, step, criterion, weight=1.0))

def slow(config):
    return Slow()

def shared_recipe():
    """Slow, two groups a step, ConAdv; rank 1 leaves its number."""
    return recipe().replace(method=f"{__file__}:slow_conadv", micro_batch=10, staleness=2)

def slow_conadv(config):
    from conadv_lab.methods.families.conadv import ConAdv
    from conadv_lab.methods.attack import SignAttack

    class SlowConAdv(ConAdv):
        def backward(self, model, step, criterion):
            time.sleep(0.05)
            return super().backward(model, step, criterion)

    if os.environ.get("RANK") == "1":
        pathlib.Path(os.environ["SUBMITIT_FOLDER"]).parents[1].joinpath("rank-1.pid").write_text(str(os.getpid()))
    return SlowConAdv(SignAttack(0.1), config.method.staleness)

class Greedy(Method):
    steps = 0
    def backward(self, model, step, criterion):
        self.steps += 1
        if self.steps > 5:
            time.sleep(2)  # the checkpoint that is written beside the training is on the disk
            self.held = bytearray(2 << 30)
            time.sleep(20)
        return Losses(train_on_clean(model, step, criterion, weight=1.0))

def greedy(config):
    return Greedy()
'''

FAKE = {
    "sbatch": 'if [ "$1" = --test-only ]; then cat >/dev/null; exit; fi\n'
    'echo "Submitted batch job 41"; cp "$1" "$FAKE/sent"',
    "squeue": 'echo "$@" >>"$FAKE/squeue-calls"\ncat "$FAKE/queue" 2>/dev/null\ntrue',
    "scontrol": 'echo "$@" >>"$FAKE/scontrol-calls"\ncat "$FAKE/job" 2>/dev/null\ntrue',
    "scancel": 'echo "$@" >>"$FAKE/scancel-calls"',
    "sinfo": "printf 'low\\nhigh\\n'",
    "srun": "exit 1",
}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder with stand-ins of SLURM's commands first on PATH; they read and write the files in it."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, body in FAKE.items():
        write_command(folder, name, body)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_command(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def no_slurm(monkeypatch) -> None:
    """A machine without SLURM."""
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(slurm, "CONFIGURATIONS", ())


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def sent(path: Path, **job) -> Record:
    """A run folder as submit leaves it, its job with number 41."""
    from conadv_lab.recipes.digits import vanilla

    record = Record(path)
    record.write_job(
        {"config": vanilla().to_dict(), "identity": path.name, "recipe": "digits-vanilla", **job}
    )
    record.note(
        "submitted", job="41", jobs=str(path / ".launch" / "jobs"), local=False, host="here", profile="slurm"
    )
    return record


class Cluster:
    """The real SLURM, and how tests wait for what it does."""

    def submit(self, *words: object) -> int:
        return submit.main([str(word) for word in words])

    def state(self, run: Path) -> State:
        return states([run])[0]

    def wait(self, run: Path, *wanted: str, seconds: float = 120) -> State:
        """The run's state once it is one of those wanted."""
        until = time.monotonic() + seconds
        while (found := self.state(run)).word not in wanted:
            if time.monotonic() > until or found.word in ("failed", "out of memory", "cancelled", "lost"):
                logs = "\n".join(file.read_text()[-2000:] for file in (run / ".launch/jobs").glob("*.err"))
                pytest.fail(f"{run.name} is {found}, not {' or '.join(wanted)}\n{logs}")
            time.sleep(0.3)
        return found

    def wait_for_step(self, run: Path, step: int) -> None:
        """Return once so many steps are logged."""
        until, metrics = time.monotonic() + 120, run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            found = self.state(run)
            if found.word not in ("pending", "running") or time.monotonic() > until:
                pytest.fail(f"{run.name} is {found}, before step {step}")
            time.sleep(0.2)

    def until(self, so: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Return once ``so()`` is true; no test may wait for ever."""
        end = time.monotonic() + seconds
        while not so():
            if time.monotonic() > end:
                pytest.fail(f"{seconds:.0f} s passed and not yet: {what}")
            time.sleep(0.05)

    def signalled(self, job: str) -> bool:
        """Send USR2 to the job's processes; always true."""
        subprocess.run(["scancel", "--signal=USR2", job], check=False, capture_output=True, timeout=30)
        return True

    def jobs(self) -> set[str]:
        return {
            job for job, (state, _) in slurm.queue().items() if state in ("PENDING", "RUNNING", "COMPLETING")
        }

    def command(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def cluster():
    """The real cluster, one test at a time; skipped where there is none."""
    if not slurm.is_here():
        pytest.skip("no SLURM here: slurm/local/up starts one, and prints the SLURM_CONF to export")
    try:
        there = subprocess.run(
            ["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=10
        )
    except subprocess.TimeoutExpired:
        pytest.skip("SLURM does not answer")
    if {"low", "high"} - set(there.stdout.split()):
        pytest.skip(f"this SLURM is not the one of slurm/local/up: {(there.stdout + there.stderr).strip()}")
    with Path(os.environ["SLURM_CONF"]).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = Cluster()
        yield found
        slurm.cancel(sorted(found.jobs()))
        until = time.monotonic() + 30
        while found.jobs() and time.monotonic() < until:
            time.sleep(0.2)
