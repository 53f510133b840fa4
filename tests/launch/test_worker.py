"""What the rank on a node refuses, and how it leaves when it is told to stop."""

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from conadv_lab.launch import worker
from conadv_lab.launch.ranks import MEETING
from conadv_lab.launch.records import Record, last
from tests.launch.conftest import sent, write_command

MINUTES, DELAY = 60, 120


def clock(after_now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + after_now))


def shown(
    fake, state: str, start: float, end: float, preempted: float | None = None, restarts: int = 0
) -> None:
    (fake / "job").write_text(
        f"JobId=41 JobState={state} Restarts={restarts} StartTime={clock(start)} EndTime={clock(end)} "
        f"PreemptTime={None if preempted is None else clock(preempted)}\n"
    )


CAUSES = {
    # A limit of ten minutes or less is not over from the first second.
    "told just after the start": (("RUNNING", -1, 600), ("asked", True)),
    "in time before the limit": (("RUNNING", -3500, 100), ("timed out", True)),
    "a minute early": (("RUNNING", -3440, 170), ("timed out", True)),
    "preempted": (("RUNNING", -10, 20, 0), ("preempted", True)),
    "preempted in an earlier attempt": (("RUNNING", -10, 3000, -500), ("asked", True)),
    "preempted, SLURM queues it": (("COMPLETING", -10, 0, 0, 1), ("preempted", False)),
    "preempted, SLURM cancels it": (("COMPLETING", -10, 0, 0), ("preempted", True)),
    "cancelled": (("COMPLETING", -10, 0), ("cancelled", False)),
    "cancelled and over": (("CANCELLED", -10, 0), ("cancelled", False)),
    "requeued by somebody": (("COMPLETING", -10, 0, None, 1), ("asked", False)),
    "over its limit": (("COMPLETING", -3601, 0), ("timed out", True)),
}


@pytest.mark.parametrize("name", CAUSES)
def test_why_a_run_was_told_to_stop(name, fake):
    arguments, wanted = CAUSES[name]
    shown(fake, *arguments)
    assert worker.stop_cause("41", MINUTES, DELAY, restarts=0) == wanted


def test_a_job_that_slurm_does_not_know_is_queued_again_to_be_safe(fake):
    write_command(fake, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert worker.stop_cause("41", MINUTES, DELAY, restarts=0) == ("asked", True)


def rank(record: Record, number: int = 0, cluster: str = "slurm") -> worker.Rank:
    record.write_job(
        record.job | {"profile": {"minutes": MINUTES, "signal_delay_s": DELAY, "cpus_per_task": 1}}
    )
    record.__dict__.pop("job")
    place = SimpleNamespace(job_id="41", global_rank=number, num_tasks=1, cluster=cluster, hostname="here")
    return worker.Rank(record, place)


def leave(one: worker.Rank) -> int:
    with pytest.raises(SystemExit) as left:
        one._leave("stopped by SIGUSR2 after step 7")
    return left.value.code


def step(record: Record, number: int) -> None:
    folder = record.path / "checkpoints" / f"step_{number:08d}"
    folder.mkdir(parents=True)
    (folder / "COMMIT.json").write_text("{}")


@pytest.fixture(autouse=True)
def jobs_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "jobs"))
    (tmp_path / "jobs").mkdir()


def test_a_node_that_fails_gently_is_told(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    shown(fake, "COMPLETING", -10, 0, restarts=1)
    log = "error: *** STEP 41.0 ON n1 CANCELLED AT now DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"
    (tmp_path / "jobs" / "41_0_log.err").write_text(f"{log}\n")
    assert leave(one) == 75
    assert last(one.record.events(), "stopped")["cause"] == "node failure"
    assert "requeue" not in (fake / "scontrol-calls").read_text()


def test_a_preempted_run_is_queued_again(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    step(one.record, 7)
    shown(fake, "RUNNING", -10, 20, 0)
    assert leave(one) == 75
    assert last(one.record.events(), "stopped")["cause"] == "preempted"
    assert last(one.record.events(), "stopped")["step"] == 7
    assert (fake / "scontrol-calls").read_text().splitlines()[-1] == "requeue 41"


def test_a_cancelled_run_is_not_brought_back(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    shown(fake, "COMPLETING", -10, 0)
    assert leave(one) == 75
    assert "requeue" not in (fake / "scontrol-calls").read_text()


def test_a_run_that_gets_nowhere_in_its_time_is_not_queued_for_ever(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    step(one.record, 7)
    statuses = []
    for _ in range(3):
        one = rank(one.record)
        shown(fake, "RUNNING", -3500, 100)
        statuses.append(leave(one))
    assert statuses == [75, 75, 1]
    assert "no step finished in 3 attempts of 60 min each" in last(one.record.events(), "failed")["error"]
    assert (fake / "scontrol-calls").read_text().count("requeue 41") == 2


def test_a_run_of_which_another_rank_failed_is_not_queued_again(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    one.record.note("started", job="41")
    one.record.note("failed", job="41", rank=1, error="ValueError: no")
    shown(fake, "RUNNING", -100, 3000)
    assert leave(one) == 1
    assert "requeue" not in (fake / "scontrol-calls").read_text()


def test_a_run_that_gets_on_is_queued_again_at_every_limit(fake, tmp_path):
    one = rank(sent(tmp_path / "run"))
    for number in range(5):
        one = rank(one.record)
        step(one.record, number + 1)
        shown(fake, "RUNNING", -3500, 100)
        assert leave(one) == 75


def test_other_ranks_leave_the_queueing_to_rank_0(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "WAIT_TO_BE_KILLED", 0)
    one = rank(sent(tmp_path / "run"), number=1)
    assert leave(one) == 75
    assert last(one.record.events(), "stopped") is None
    assert not (fake / "scontrol-calls").exists()


def wait_for(event: threading.Event) -> None:
    assert event.wait(30)


def test_a_second_signal_waits_until_the_first_has_queued_the_job_again(fake, tmp_path, monkeypatch):
    """However long scontrol takes: the second one's exit would be the end of a run that nobody queued again."""
    monkeypatch.setattr(worker, "WAIT_TO_BE_KILLED", 0)
    one = rank(sent(tmp_path / "run"))
    shown(fake, "RUNNING", -10, 20, 0)
    asked, answer, exits = threading.Event(), threading.Event(), []

    def slow_requeue(_job):
        asked.set()
        wait_for(answer)
        exits.append("queued")

    monkeypatch.setattr(worker, "_requeue", slow_requeue)
    monkeypatch.setattr(os, "_exit", exits.append)
    first, second = (
        threading.Thread(target=suppressed, args=(one._leave, f"stopped by {name}"), daemon=True)
        for name in ("SIGUSR2", "SIGTERM")
    )
    first.start()
    wait_for(asked)
    second.start()
    second.join(0.5)
    assert exits == []
    answer.set()
    first.join(30)
    assert exits == ["queued", 75]
    assert second.is_alive()


def suppressed(leave, why: str) -> None:
    """In a thread whose os._exit is a stand-in that comes back."""
    with contextlib.suppress(SystemExit):
        leave(why)


def test_a_signal_that_interrupts_the_leaving_itself_lets_it_go_on(fake, tmp_path, monkeypatch):
    """As Python runs a handler in the main thread when a library's own thread got the signal."""
    one = rank(sent(tmp_path / "run"))
    shown(fake, "RUNNING", -10, 20, 0)
    requeue = worker._requeue

    def interrupted(job):
        one._stopped_outside_training(signal.SIGTERM)
        requeue(job)

    monkeypatch.setattr(worker, "_requeue", interrupted)
    assert leave(one) == 75
    assert (fake / "scontrol-calls").read_text().count("requeue 41") == 1


def test_a_stop_that_failed_half_way_is_tried_again_by_the_next_signal(fake, tmp_path, monkeypatch):
    one = rank(sent(tmp_path / "run"))
    shown(fake, "RUNNING", -10, 20, 0)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_newest_step", lambda _run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one._leave("stopped by SIGUSR2 after step 7")
    assert leave(one) == 75
    assert (fake / "scontrol-calls").read_text().splitlines()[-1] == "requeue 41"


def test_the_other_ranks_wait_longer_than_a_controller_is_asked(fake, monkeypatch):
    """Rank 0 asks it twice."""
    assert worker.WAIT_TO_BE_KILLED > 2 * worker.SCONTROL_PATIENCE
    monkeypatch.setattr(worker, "SCONTROL_PATIENCE", 0.5)
    write_command(fake, "scontrol", "exec sleep 20")
    began = time.monotonic()
    assert worker._scontrol("requeue", "41") == ""
    write_command(fake, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert worker._scontrol("requeue", "41") == ""
    assert time.monotonic() - began < 10


@pytest.fixture
def nobody_met(monkeypatch) -> dict[str, str]:
    """An environment of its own, without the words that ranks meet by."""
    left = {name: value for name, value in os.environ.items() if name not in (*MEETING, "LOCAL_RANK")}
    monkeypatch.setattr(os, "environ", left)
    return left


def test_a_port_that_is_inherited_does_not_make_every_rank_the_only_one(tmp_path, nobody_met):
    nobody_met["MASTER_PORT"] = "1"
    place = SimpleNamespace(job_id="41", global_rank=0, local_rank=0, num_tasks=2)
    worker.ranks.introduce(place, tmp_path)
    assert (nobody_met["RANK"], nobody_met["WORLD_SIZE"]) == ("0", "2")
    assert nobody_met["MASTER_PORT"] != "1"
    port = nobody_met["MASTER_PORT"]
    worker.ranks.introduce(place, tmp_path / "nowhere")  # all are set, as a site's own lines may do
    assert nobody_met["MASTER_PORT"] == port


def test_the_next_stretch_here_does_not_meet_where_this_one_did(tmp_path, nobody_met):
    """Begun again by submitit's controller a job has the same number, so that ranks would read the old address."""
    one = rank(sent(tmp_path / "run"), cluster="local")
    place = SimpleNamespace(job_id="41", global_rank=0, local_rank=0, num_tasks=2)
    worker.ranks.introduce(place, one.record.folder)
    assert len(list(one.record.folder.glob("meeting-*.json"))) == 1
    leave(one)
    assert not list(one.record.folder.glob("meeting-*.json"))


def test_the_next_stretch_knows_what_ended_the_one_before(fake, tmp_path):
    record = sent(tmp_path / "run")
    rank(record)._note_start()
    assert last(record.events(), "started")["after"] is None
    log = tmp_path / "jobs" / "41_0_log.err"
    log.write_text(
        "conadv_lab starts an attempt\nerror: *** JOB 41 ON n1 CANCELLED AT now DUE TO NODE FAILURE ***\n"
    )
    rank(record)._note_start()
    assert last(record.events(), "started")["after"] == "node failure"


def test_paths_of_the_config_start_where_the_run_was_sent_from(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    one = rank(sent(tmp_path / "run", folder=str(tmp_path / "there"), snapshot={"path": "x", "digest": "x"}))

    def check(*_words):
        raise RuntimeError(f"in {os.getcwd()}")

    monkeypatch.setattr(worker.snapshot, "check", check)
    monkeypatch.setattr(worker.signals, "take_over", lambda handler: None)
    with pytest.raises(RuntimeError, match="there"):
        one.run()
    assert last(one.record.events(), "failed")["error"] == f"RuntimeError: in {tmp_path / 'there'}"


def test_fewer_cpus_than_asked_for_are_refused(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1})
    worker.check_cpus(2)
    with pytest.raises(RuntimeError, match="got 2 CPUs, but 4 were requested"):
        worker.check_cpus(4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    with pytest.raises(RuntimeError, match="got 1 CPUs, but 2 were requested"):
        worker.check_cpus(2)
