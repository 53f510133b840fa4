"""On a real SLURM: whatever happens to a job, its run is told rightly, loses nothing and can be finished."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from conadv_lab import train
from conadv_lab.launch import slurm
from conadv_lab.launch.records import Record, last

pytestmark = pytest.mark.slurm


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def undisturbed(own: str, tmp_path: Path, *words: str) -> dict:
    """The result of the same run, trained here without any interruption."""
    out = tmp_path / "undisturbed"
    assert train.main([f"{own}:recipe", "--out", str(out), *words]) == 0
    return json.loads((out / "result.json").read_text())


def finished(run: Path) -> str:
    """The hash of a finished run's parameters, its metrics having every step once."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(steps[-1] + 1))
    assert not list(run.glob("checkpoints/.partial-*"))
    return json.loads((run / "result.json").read_text())["parameters_sha256"]


def test_a_run_is_preempted_and_resumes_bitwise(cluster, own, run, tmp_path):
    longer = ("--steps", "150")  # it must not be over before it is preempted
    assert cluster.submit("run", f"{own}:recipe", "--out", run, "--partition", "low", *longer) == 0
    cluster.wait_for_step(run, 15)
    urgent = "sleep 3"
    cluster.command(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--wrap={urgent}", "--output=/dev/null"
    )
    assert cluster.wait(run, "pending").preempted == 1
    assert str(cluster.wait(run, "done")) == "done, preempted ×1"
    assert finished(run) == undisturbed(own, tmp_path, *longer)["parameters_sha256"]
    stopped = last(Record(run).events(), "stopped")
    assert stopped["step"] >= 15
    assert cluster.jobs() == set()


def on_two_nodes(tmp_path: Path) -> Path:
    site = tmp_path / "two.toml"
    site.write_text('partition = "low"\nnodes = 2\n')
    return site


def test_two_nodes_train_together_are_preempted_and_resume_bitwise(cluster, own, run, tmp_path):
    words = ("run", f"{own}:shared_recipe", "--profile", on_two_nodes(tmp_path), "--steps", "150", "--out")
    assert cluster.submit(*words, run) == 0
    cluster.wait_for_step(run, 15)
    cluster.command(
        "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 3", "--output=/dev/null"
    )
    assert cluster.wait(run, "pending").preempted == 1
    assert str(cluster.wait(run, "done")) == "done, preempted ×1"
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["ranks"], manifest["slurm"]["SLURM_JOB_NUM_NODES"]) == (2, "2")
    whole = tmp_path / "whole"
    assert cluster.submit(*words, whole) == 0
    assert str(cluster.wait(whole, "done")) == "done"
    assert finished(run) == finished(whole)


def test_one_of_two_ranks_is_killed_and_the_run_is_continued(cluster, own, run, tmp_path):
    words = ("--profile", on_two_nodes(tmp_path), "--steps", "40")
    assert cluster.submit("run", f"{own}:shared_recipe", "--out", run, *words) == 0
    cluster.wait_for_step(run, 15)
    os.kill(int((run / "rank-1.pid").read_text()), signal.SIGKILL)
    detail = cluster.wait(run, "failed", seconds=60).detail
    assert "Killed" in detail or "another rank has failed" in detail
    cluster.until(lambda: not cluster.jobs(), "the job leaves the queue")
    assert cluster.submit("retry", run, "--failed") == 0
    cluster.wait(run, "done")
    (run / "rank-1.pid").unlink()
    whole = tmp_path / "whole"
    assert cluster.submit("run", f"{own}:shared_recipe", "--out", whole, *words) == 0
    cluster.wait(whole, "done")
    assert finished(run) == finished(whole)


def test_a_site_that_sends_only_term(cluster, own, run):
    assert cluster.submit("run", f"{own}:recipe", "--out", run) == 0
    cluster.wait_for_step(run, 5)
    cluster.command("scancel", "--signal=TERM", cluster.state(run).job)
    assert "requeued after it was asked" in str(cluster.wait(run, "pending"))
    cluster.wait(run, "done")
    finished(run)


def test_signals_while_a_run_starts_kill_nothing(cluster, own, run):
    assert cluster.submit("run", f"{own}:recipe", "--out", run) == 0
    job = cluster.state(run).job
    # scancel would wait for seconds, and miss the start, if the job did not run yet.
    cluster.until(lambda: slurm.queue()[job][0] == "RUNNING", f"job {job} runs")
    cluster.until(lambda: cluster.signalled(job) and last(Record(run).events(), "stopped"), "the run stops")
    assert last(Record(run).events(), "stopped")["step"] == 0
    cluster.wait(run, "done")
    finished(run)


def test_a_time_limit_is_survived(cluster, own, run):
    # SLURM looks every 30 s and may tell 30 s early: 5 to 35 s after the start.
    words = ("--minutes", "1", "--signal-delay-s", "25", "--steps", "760")
    assert cluster.submit("run", f"{own}:recipe", "--out", run, *words) == 0
    state = cluster.wait(run, "done", seconds=200)
    assert state.timed_out >= 1
    assert state.preempted == 0
    finished(run)


def test_a_node_goes_down_and_comes_back(cluster, own, run):
    assert cluster.submit("run", f"{own}:recipe", "--out", run) == 0
    cluster.wait_for_step(run, 15)
    node = last(Record(run).events(), "started")["slurm"]["SLURM_JOB_NODELIST"]
    try:
        cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        assert str(cluster.wait(run, "done")) == "done, restarted after a node failure ×1"
    finally:
        cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    finished(run)


def test_a_killed_process_is_told_and_continued(cluster, own, run, tmp_path, capsys):
    assert cluster.submit("run", f"{own}:recipe", "--out", run, "--steps", "40") == 0
    cluster.wait_for_step(run, 15)
    os.kill(last(Record(run).events(), "started")["pid"], signal.SIGKILL)
    assert "Killed" in cluster.wait(run, "failed").detail
    assert cluster.submit("retry", run, "--failed") == 0
    assert cluster.wait(run, "done").restarted == 0
    assert finished(run) == undisturbed(own, tmp_path, "--steps", "40")["parameters_sha256"]


def test_out_of_memory_is_told(cluster, own, run):
    assert cluster.submit("run", f"{own}:greedy_recipe", "--out", run, "--mem-gb", "1.5") == 0
    assert str(cluster.wait(run, "out of memory", "done", "failed")).startswith("out of memory (after step")
    assert (run / "checkpoints" / "step_00000003" / "COMMIT.json").exists()


def test_cancelled_while_saving_stays_cancelled_and_can_be_continued(cluster, own, run):
    words = ("--checkpoint-every", "1")
    assert cluster.submit("run", f"{own}:recipe", "--out", run, *words) == 0
    cluster.wait_for_step(run, 5)
    cluster.command("scancel", cluster.state(run).job)
    cluster.wait(run, "cancelled")
    cluster.until(lambda: not cluster.jobs(), "the job leaves the queue")
    assert cluster.state(run).word == "cancelled"
    assert cluster.submit("retry", run) == 0
    cluster.wait(run, "done")
    finished(run)


def test_cancel_ends_waiting_and_running_runs(cluster, own, tmp_path):
    words = ("--lr", "0.1,0.2", "--max-parallel", "1")
    assert cluster.submit("sweep", f"{own}:recipe", "--out", tmp_path / "sweep", *words) == 0
    runs = [tmp_path / "sweep" / name for name in ("lr=0.1", "lr=0.2")]
    cluster.wait_for_step(runs[0], 1)
    assert str(cluster.state(runs[1])) == "pending (the sweep's limit of parallel runs is reached)"
    assert cluster.submit("cancel", tmp_path / "sweep") == 0
    for run in runs:
        assert cluster.wait(run, "cancelled").word == "cancelled"


def test_arrays_are_split_and_wait_for_one_another(cluster, own, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text('partition = "low"\nmax_array = 2\nmax_parallel = 1\n')
    words = (
        "sweep",
        f"{own}:recipe",
        "--out",
        tmp_path / "sweep",
        "--profile",
        site,
        "--steps",
        "3",
        "--seed",
        "0,1,2",
    )
    assert cluster.submit(*words) == 0
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in range(3)]
    assert cluster.state(runs[2]).detail == "waiting for another array"
    queued = cluster.jobs()
    assert cluster.submit(*words) == 0
    assert cluster.jobs() <= queued
    for run in runs:
        cluster.wait(run, "done")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "lwo"], "unknown partition 'lwo'; allowed: high, low. Did you mean 'low'?"),
        (["--nodes", "3", "--micro-batch", "5"], "no nodes for nodes 3"),
        (["--cpus-per-task", "4000"], "no nodes for"),
        (["--gpus-per-node", "1"], "gres is '1'"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_before_anything_is_written(
    cluster, own, run, words, message, capsys
):
    before = set(run.parent.iterdir())
    assert cluster.submit("run", f"{own}:recipe", "--out", run, *words) == 2
    assert message in capsys.readouterr().err
    assert set(run.parent.iterdir()) == before
    assert cluster.jobs() == set()


def test_too_long_an_array_is_refused_before_anything_is_written(cluster, own, tmp_path, capsys):
    site = tmp_path / "site.toml"
    site.write_text("max_array = 5000\n")
    seeds = ",".join(map(str, range(1100)))
    words = ("sweep", f"{own}:recipe", "--out", tmp_path / "sweep", "--profile", site, "--seed", seeds)
    assert cluster.submit(*words) == 2
    assert "Invalid job array specification" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert cluster.jobs() == set()


def test_a_dead_rank_ends_the_job_within_a_minute(cluster, own, run, tmp_path):
    rank = tmp_path / "rank.sh"
    rank.write_text('if [ "$SLURM_PROCID" = 1 ]; then kill -9 $$; fi; sleep 300\n')
    site = tmp_path / "site.toml"
    site.write_text(f'partition = "low"\nnodes = 2\npython = "bash {rank}"\n')
    assert cluster.submit("run", f"{own}:shared_recipe", "--out", run, "--profile", site) == 0
    cluster.wait(run, "failed", seconds=60)


def test_no_binding_is_inherited_and_the_copied_code_is_run(cluster, own, run, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    assert cluster.submit("run", f"{own}:recipe", "--out", run, "--steps", "2") == 0
    cluster.wait(run, "done")
    told = json.loads((run / "manifest.json").read_text())["slurm"]
    assert told.get("SLURM_CPU_BIND") != "quiet,mask_cpu:0x1"
    assert told["SLURM_JOB_PARTITION"] == "low"


def test_what_was_sent_is_what_the_dry_run_showed(cluster, own, run, capsys):
    words = ("run", f"{own}:recipe", "--out", run, "--steps", "2")
    assert cluster.submit(*words, "--dry-run") == 0
    shown = capsys.readouterr().out.partition("# sbatch script 1 of 1\n")[2]
    assert not run.exists()
    assert cluster.submit(*words) == 0
    job = cluster.state(run).job
    assert (run / ".launch" / "jobs" / f"{job}_submission.sh").read_text() == shown
    assert sys.executable in shown
    cluster.wait(run, "done")
