"""The state of a run in words, from what its folder and SLURM say."""

import json
import os

import pytest

from conadv_lab.launch.status import state, states
from conadv_lab.launch.words import START_MARK
from tests.launch.conftest import sent

CANCELLED = "slurmstepd: error: *** JOB 41 ON n1 CANCELLED AT 2026-01-01T00:00:00"


def told(record, slurm_state: str = "", reason: str = "None") -> str:
    return str(state(record, record.events(), {"41": (slurm_state, reason)} if slurm_state else {}))


def started(tmp_path, **details):
    record = sent(tmp_path / "run")
    record.note("started", job="41", after=None, **details)
    return record


def log(record, *lines: str) -> None:
    jobs = record.folder / "jobs"
    jobs.mkdir()
    (jobs / "41_0_log.err").write_text("\n".join([*lines, ""]))


def test_pending_says_why(tmp_path):
    record = sent(tmp_path / "run")
    assert told(record, "PENDING", "Resources") == "pending (waiting for free nodes)"
    assert told(record, "PENDING", "Licenses") == "pending (Licenses)"
    assert (
        told(record, "PENDING", "ReqNodeNotAvail, UnavailableNodes:n1")
        == "pending (its nodes are down or reserved)"
    )


def test_running_gives_step_speed_and_time_left(tmp_path):
    record = started(tmp_path)
    assert told(record, "RUNNING") == "running (starting)"
    line = {"step": 9, "epoch": 2.25, "images_per_second": 100.0}
    (record.path / "metrics.jsonl").write_text(
        json.dumps({"step": 8}) + "\n" + json.dumps(line) + "\n" + '{"st'
    )
    # 40 epochs of 4 steps of 256 images
    assert told(record, "RUNNING") == "running (step 10/160, 100 images/s, 0:06:24 left)"


def test_interruptions_are_counted(tmp_path):
    record = started(tmp_path)
    for cause in ("preempted", "timed out", "preempted"):
        record.note("stopped", job="41", cause=cause, why="")
    assert told(record, "PENDING", "BeginTime") == (
        "pending (requeued after it was preempted, waiting for its start time), preempted ×2, timed out ×1"
    )
    record.note("started", job="41", after="node failure")
    assert told(record, "RUNNING").endswith("preempted ×2, timed out ×1, restarted after a node failure ×1")
    (record.path / "result.json").write_text("{}")
    assert told(record).startswith("done, preempted ×2")


def test_submit_may_note_a_job_after_it_started(tmp_path):
    record = sent(tmp_path / "run")
    record.note("started", job="42", after=None)
    record.note("submitted", job="42", jobs="", local=False, host="here", profile="slurm")
    record.note("failed", job="42", rank=0, error="ValueError: no")
    assert (
        str(state(record, record.events(), {"42": ("FAILED", "NonZeroExitCode")}))
        == "failed (ValueError: no)"
    )


ENDS = {
    "exception": (["x"], "FAILED", "failed (x)"),
    "killed": ([CANCELLED + " ***", f"{START_MARK} of job 41", "srun: error: n1: task 0: Killed",
                CANCELLED.replace("JOB 41", "STEP 41.0") + " ***", "srun: Force Terminated StepId=41.0"], "FAILED",
               "failed (srun: error: n1: task 0: Killed)"),
    "silent": ([], "FAILED", "failed (killed without a message)"),
    "accounting's memory": (["error: StepId=4.0 exceeded memory limit (3 > 1), being killed"], "FAILED",
                            "out of memory (before the first step)"),
    "kernel's memory": (["error: Detected 1 oom_kill event in StepId=3.0."], "FAILED",
                        "out of memory (before the first step)"),
    "memory": ([], "OUT_OF_MEMORY", "out of memory (before the first step)"),
    "node": ([], "NODE_FAIL", "node failure (before the first step)"),
    "node, forgotten": ([CANCELLED + " DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***"], "",
                        "node failure (before the first step)"),
    "time": ([], "TIMEOUT", "timed out (before the first step)"),
    "time, forgotten": ([CANCELLED + " DUE TO TIME LIMIT ***"], "", "timed out (before the first step)"),
    "cancelled": ([], "CANCELLED", "cancelled (before the first step)"),
    "cancelled, forgotten": ([CANCELLED + " ***"], "", "cancelled (before the first step)"),
    "lost": ([], "", "lost (ended without a message)"),
    "ended well, but nothing there": ([], "COMPLETED", "lost (ended without a message)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_how_a_run_ended(name, tmp_path):
    lines, slurm_state, words = ENDS[name]
    record = started(tmp_path)
    log(record, *lines)
    assert told(record, slurm_state) == words


def test_a_cancelled_run_stays_so_when_slurm_has_forgotten_it(tmp_path):
    record = started(tmp_path)
    record.note("cancelled", job="41")
    record.note("stopped", job="41", cause="cancelled", why="")
    assert told(record).startswith("cancelled")
    assert told(record, "COMPLETING") == "cancelled (still ending)"


def test_a_run_that_never_started_and_is_unknown_is_lost(tmp_path):
    assert told(sent(tmp_path / "run")) == "lost (never started)"


def test_finished_runs_ask_slurm_nothing(tmp_path, fake):
    record = started(tmp_path)
    (record.path / "result.json").write_text("{}")
    assert str(states([record.path])[0]) == "done"
    assert not (fake / "squeue-calls").exists()


def test_many_runs_are_one_question(tmp_path, fake):
    (fake / "queue").write_text("41|PENDING|Priority\n")
    paths = [sent(tmp_path / f"run{number}").path for number in range(20)]
    assert {str(one) for one in states(paths)} == {"pending (jobs with higher priority come first)"}
    assert len((fake / "squeue-calls").read_text().splitlines()) == 1


def test_a_local_run_whose_process_is_gone_is_lost(tmp_path):
    record = sent(tmp_path / "run")
    record.note(
        "submitted",
        job=str(2**22 - 3),
        jobs="/nowhere",
        local=True,
        host=os.uname().nodename,
        profile="local",
    )
    assert str(states([record.path])[0]) == "lost (never started)"
