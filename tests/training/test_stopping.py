"""A first Ctrl-C lets the step end and saves (test_loop.py); a second one does not wait for that."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conadv_lab.runs import RunFolder
from conadv_lab.training import loop
from conadv_lab.training.loop import train
from conadv_lab.training.stopping import interrupts_end_the_process
from tests.training.test_loop import tiny

SLOW = """
import time
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.steps import train_on_clean

class Slow(Method):
    def backward(self, model, step, criterion):
        if step.number == 2:
            print("in the middle", flush=True)
            time.sleep(SECONDS)
        return Losses(train_on_clean(model, step, criterion, weight=1.0))

def slow(config):
    return Slow()
"""
RUN = ["--train-images", "60", "--global-batch", "20", "--steps", "6", "--warmup-epochs", "0", "--bn-recalibrate", "0",
       "--checkpoint-every", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_the_foreground():
    """Where the tests are a shell's background job, SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def begun(tmp_path: Path, seconds: float) -> subprocess.Popen:
    """A run that is in the middle of step 2, which takes so many seconds."""
    (tmp_path / "own.py").write_text(SLOW.replace("SECONDS", str(seconds)))
    words = ["digits-vanilla", "--method", f"{tmp_path}/own.py:slow", *RUN, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "conadv_lab.train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "in the middle" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    return process


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_command_at_once(tmp_path):
    process = begun(tmp_path, 300)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "Ctrl-C again stops at once" in err
    assert "Traceback" not in err
    assert RunFolder(tmp_path / "run").load_checkpoint() is not None


def test_in_a_notebook_the_second_one_interrupts_the_cell(tmp_path, monkeypatch):
    """The kernel lives on: what the handler of before makes of a Ctrl-C is raised in the middle of the step."""
    original, reached = loop.Run.train_step, []

    def interrupted(run):
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("second")
        original(run)

    whole = train(tiny(), tmp_path / "whole", progress="none").result()
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run", progress="none")
    assert reached == ["first"]
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(tiny(), tmp_path / "run", resume=True, progress="none").result()
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]


def test_the_command_may_run_in_a_thread_of_somebody_elses():
    def entered() -> bool:
        with interrupts_end_the_process():
            return True

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(entered).result()
