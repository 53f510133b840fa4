"""Two jobs never train in one folder, and nobody is kept out by a process that is gone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conadv_lab import train as command
from conadv_lab.data.workers import WorkerContext
from conadv_lab.training import claim, loop
from conadv_lab.training.claim import LOCK, Claim
from tests.training.test_loop import digest, tiny, train_killed_before

HOLDER = """
import sys, time
from pathlib import Path
from conadv_lab.training.claim import Claim
claim = Claim(Path(sys.argv[1]))
claim.take()
print("held", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that holds a folder's lock, as another job would."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Makes holders of a folder, which are gone after the test; nobody waits for them."""
    monkeypatch.setattr(claim, "PATIENCE", 0.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    made: list[Holder] = []

    def holder(**environment: str) -> Holder:
        made.append(Holder(tmp_path / "run", **environment))
        return made[-1]

    yield holder
    for one in made:
        one.kill()


def test_a_second_job_is_told_who_trains_there_and_writes_nothing(held, tmp_path, capsys):
    other = held(SLURM_JOB_ID="41")
    with pytest.raises(
        ValueError, match=rf"is being trained by process {other.process.pid} on .*, SLURM job 41;"
    ):
        loop.train(tiny(), tmp_path / "run", progress="none")
    words = [
        "digits-conadv",
        "--steps",
        "2",
        "--warmup-epochs",
        "0",
        "--resume",
        "--out",
        str(tmp_path / "run"),
    ]
    assert command.main(words) == 2
    assert capsys.readouterr().err.count("is being trained by") == 1
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == other.process.pid


def test_a_process_that_was_killed_keeps_nobody_out(held, tmp_path):
    held().kill()
    assert loop.train(tiny(), tmp_path / "run", progress="none").result() is not None


def test_one_that_is_just_ending_is_waited_for(held, tmp_path, monkeypatch):
    other = held()
    monkeypatch.setattr(claim, "PATIENCE", 60.0)
    monkeypatch.setattr(claim.time, "sleep", lambda _seconds: other.kill())
    Claim(tmp_path / "run").take()


def test_a_requeued_job_is_not_kept_out_by_its_own_earlier_stretch(held, tmp_path, monkeypatch):
    """As where a lost node's locks outlive it on the file server; but not by another job, nor within a stretch."""
    held(SLURM_JOB_ID="41", SLURM_RESTART_COUNT="1")
    for job, restarts in (("42", "2"), ("41", "1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(ValueError, match="SLURM job 41"):
            Claim(tmp_path / "run").take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.warns(UserWarning, match="earlier attempt of job 41"):
        Claim(tmp_path / "run").take()


def test_a_stopped_run_gives_the_folder_back_and_a_finished_one_leaves_no_lock(held, tmp_path, monkeypatch):
    train_killed_before(3, tiny(), tmp_path / "run", monkeypatch)
    held().kill()
    folder = loop.train(tiny(), tmp_path / "run", resume=True, progress="none")
    assert not (folder.path / LOCK).exists()


def test_loader_workers_do_not_hold_the_lock(held, tmp_path):
    """A worker may outlive its killed parent for a second."""
    mine = Claim(tmp_path / "run")
    mine.take()
    worker = WorkerContext().Process(target=signal.pause)
    worker.start()
    try:
        mine.__exit__()
        held()
    finally:
        worker.kill()
        worker.join()


def test_a_run_that_another_job_has_begun_or_finished_meanwhile_is_left_alone(tmp_path, monkeypatch):
    taken = Claim.take

    def after_another(self):
        monkeypatch.setattr(Claim, "take", taken)
        loop.train(tiny(), tmp_path / "run", progress="none")
        self.take()

    for resume, message in ((False, "already exists"), (True, "was finished by another job")):
        monkeypatch.setattr(Claim, "take", after_another)
        with pytest.raises(ValueError, match=message):
            loop.train(tiny(), tmp_path / "run", resume=resume, progress="none")
        (tmp_path / "run").rename(tmp_path / f"done-{resume}")
    assert digest(loop.RunFolder(tmp_path / "done-True")) == digest(loop.RunFolder(tmp_path / "done-False"))


def test_what_a_users_own_function_left_in_the_new_folder_is_no_other_job(tmp_path, monkeypatch):
    taken = Claim.take

    def after_a_file(self):
        taken(self)
        (self.folder / "notes.txt").write_text("of the model")

    monkeypatch.setattr(Claim, "take", after_a_file)
    assert loop.train(tiny(), tmp_path / "run", resume=True, progress="none").result() is not None


def test_where_there_are_no_locks_a_run_trains_without(tmp_path, monkeypatch):
    def none(*_words):
        raise OSError(claim.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", none)
    assert loop.train(tiny(), tmp_path / "run", progress="none").result() is not None
