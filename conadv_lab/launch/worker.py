"""What runs on the node: one rank of one run, from its ``.launch/job.json`` to its result or its next attempt.

submitit pickles `work` by name with only the path of the run folder, since a node failure requeues the original
pickle. We replace submitit's signal handling: it treats time limits of up to ten minutes as reached from the first
second, saves inside the handler and on rank 0 alone, and ignores TERM.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from submitit import JobEnvironment
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from conadv_lab import provenance
from conadv_lab.config import Config
from conadv_lab.cores import cores
from conadv_lab.launch import ranks, signals, snapshot
from conadv_lab.launch.records import Record, last, log_files, tail
from conadv_lab.launch.words import START_MARK, killed_by

STOPPED = 75
SCONTROL_PATIENCE = 120
"""Seconds for which we retry while the controller does not answer."""
WAIT_TO_BE_KILLED = 3 * SCONTROL_PATIENCE
"""Seconds: longer than rank 0 takes to find out why it was stopped and to requeue the job."""
PATIENCE = 3


def work(path: str) -> None:
    """Train the run that was sent to the folder ``path``, from its latest checkpoint.

    Raises:
        RuntimeError: the code differs from what was sent, or there are fewer CPUs than requested.
        SystemExit: 75 when stopped on request; the job is requeued if it should continue.
    """
    Rank(Record(Path(path)), JobEnvironment()).run()


class Rank:
    """One rank and its place in the job."""

    def __init__(self, record: Record, environment: Any) -> None:
        self.record, self.job = record, record.job
        self.job_id: str = environment.job_id
        self.number: int = environment.global_rank
        self.is_local: bool = environment.cluster == "local"
        self.environment = environment
        self.steps_at_start = _newest_step(record.path)
        self._leaving = threading.Lock()
        self._leaver: threading.Thread | None = None

    def run(self) -> None:
        signals.take_over(self._stopped_outside_training)
        try:
            # The config's paths are relative to it, even when retried from elsewhere.
            os.chdir(self.job["folder"])
            snapshot.check(Path(self.job["snapshot"]["path"]), self.job["snapshot"]["digest"])
            check_cpus(self.job["profile"]["cpus_per_task"])
            if self.number == 0:
                self._note_start()
            ranks.introduce(self.environment, self.record.folder)
            self._train()
        except Exception as error:
            line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            self.record.note("failed", job=self.job_id, rank=self.number, error=line)
            raise
        if self.number == 0:
            self.record.note("finished", job=self.job_id)

    def _train(self) -> None:
        from conadv_lab.training.distributed import AnotherRankFailed
        from conadv_lab.training.loop import StoppedOnRequest, train

        try:
            train(Config.from_dict(self.job["config"]), self.record.path, resume=True)
        except StoppedOnRequest as stop:
            print(stop, file=sys.stderr, flush=True)
            self._leave(str(stop))
        except AnotherRankFailed as failure:
            # That rank has recorded why, unless it was killed: then the log has srun's message and this one.
            print(failure, file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    def _note_start(self) -> None:
        before = last(self.record.events(), "started", "stopped", "failed", "cancelled")
        after = None
        if before is not None and before["event"] == "started" and before["job"] == self.job_id:
            # It ended without recording why; SLURM's message is in the log, which all attempts of a job share.
            after = self._log_says() or "killed"
        print(START_MARK, f"of job {self.job_id} on {self.environment.hostname}", file=sys.stderr, flush=True)
        self.record.note(
            "started",
            job=self.job_id,
            host=self.environment.hostname,
            pid=os.getppid() if self.is_local else os.getpid(),
            after=after,
            slurm=provenance.slurm_variables(),
        )

    def _attempts_without_a_step(self, step: int) -> int:
        """How many attempts in a row, this one included, made no progress; a single one may have been stopped early."""
        stops = [event for event in self.record.events() if event["event"] == "stopped"]
        count = int(step <= self.steps_at_start)
        while (
            count and stops and stops[-1]["cause"] in ("timed out", "asked") and stops.pop()["step"] == step
        ):
            count += 1
        return count

    def _another_rank_failed(self) -> bool:
        """Whether srun stops this rank because another one failed: a new attempt would fail too."""
        newest = last(self.record.events(), "started", "failed")
        failed = newest is not None and newest["event"] == "failed"
        return failed or self._log_says() == "out of memory"

    def _log_says(self) -> str | None:
        return killed_by(tail(log_files(Path(os.environ["SUBMITIT_FOLDER"]), self.job_id)[1]))

    def _stopped_outside_training(self, number: int) -> None:
        """Handle a stop during start-up or wrap-up: the next attempt continues from what is on disk."""
        if self._leaver is threading.current_thread():
            return  # Python runs this in the main thread if a library's thread gets the signal
        if not (self.record.path / "result.json").exists():
            self._leave(f"stopped by {signal.Signals(number).name} before a step")

    def _leave(self, why: str) -> NoReturn:
        """Exit this rank, on rank 0 after handing the job back; a second thread that calls this blocks until then."""
        self._leaving.acquire()
        self._leaver = threading.current_thread()
        try:
            status = STOPPED
            if self.number == 0:
                status = self._hand_back(why)
            elif not self.is_local:
                time.sleep(WAIT_TO_BE_KILLED)  # srun would kill rank 0 if another rank exited first
        except BaseException:
            self._leaver = None
            self._leaving.release()  # for the next signal to try again
            raise
        sys.stderr.flush()
        if threading.current_thread() is not threading.main_thread():
            os._exit(status)
        raise SystemExit(status)

    def _hand_back(self, why: str) -> int:
        """Requeue the job unless it was cancelled or makes no progress; returns the exit status."""
        step = _newest_step(self.record.path)
        if self.is_local:
            ranks.part(self.record.folder)  # a local job that is restarted keeps its id
            again = "SIGUSR2" in why
            cause = "preempted" if again else "asked"
            self.record.note("stopped", job=self.job_id, cause=cause, why=why, step=step)
            return LOCAL_REQUEUE_RETURN_CODE if again else STOPPED
        profile, restarts = self.job["profile"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        cause, again = stop_cause(self.job_id, profile["minutes"], profile["signal_delay_s"], restarts)
        if cause == "asked":
            if self._another_rank_failed():
                return 1
            if self._log_says() == "node failure":
                cause = "node failure"
        if cause in ("timed out", "asked") and self._attempts_without_a_step(step) >= PATIENCE:
            limit = profile["minutes"]
            error = f"not requeued: no step finished in {PATIENCE} attempts of {limit} min each"
            self.record.note("failed", job=self.job_id, rank=0, error=error)
            return 1
        self.record.note("stopped", job=self.job_id, cause=cause, why=why, step=step)
        if again:
            _requeue(self.job_id)
        return STOPPED


def check_cpus(wanted: int) -> None:
    """Raise unless this rank may use as many CPUs as requested.

    Raises:
        RuntimeError: it may not, for example because srun did not inherit the number, or a CPU binding was inherited.
    """
    usable = cores()
    given = min(usable, int(os.environ.get("SLURM_CPUS_PER_TASK", usable)))
    if given < wanted:
        raise RuntimeError(
            f"this rank got {given} CPUs, but {wanted} were requested (cpus_per_task), so it would run slowly. "
            "Request fewer, or check what binds the ranks (SLURM_CPU_BIND, the site's srun options)"
        )


def stop_cause(job_id: str, minutes: int, delay: int, restarts: int) -> tuple[str, bool]:
    """Why SLURM told this job to stop, and whether we have to requeue it.

    The cause is preempted, timed out, cancelled, or asked: a signal or requeue by a person. SLURM has requeued the
    job itself if it counts more ``restarts`` than this attempt started with; a job that it ended before its time
    limit was cancelled. The limit is in ``minutes``, the notice before it in ``delay`` seconds.
    """
    shown = _scontrol("show", "job", "--oneliner", job_id)
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    start, end, preempted = (_seconds(fields.get(name)) for name in ("StartTime", "EndTime", "PreemptTime"))
    running = fields.get("JobState", "RUNNING") == "RUNNING"
    again = not running and int(fields.get("Restarts", "0")) > restarts
    if preempted and preempted >= start:
        return "preempted", not again
    if running:
        # SLURM may send the signal up to a minute early.
        return "timed out" if end and end - time.time() <= delay + 65 else "asked", True
    if again:
        return "asked", False
    timed_out = end - start >= minutes * 60
    return "timed out" if timed_out else "cancelled", timed_out


def _seconds(told: str | None) -> float:
    try:
        return time.mktime(time.strptime(told or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def _requeue(job_id: str) -> None:
    print(f"requeueing job {job_id}", file=sys.stderr, flush=True)
    print(_scontrol("requeue", job_id), file=sys.stderr, flush=True)


def _scontrol(*words: str) -> str:
    """The output of scontrol; retries for two minutes while the controller does not answer."""
    until = time.monotonic() + SCONTROL_PATIENCE
    pause = 0
    while (left := until - time.monotonic()) > 0:
        try:
            done = subprocess.run(
                ["scontrol", *words], capture_output=True, text=True, timeout=min(left, 60), check=False
            )
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0 or "nable to contact" not in done.stderr:
            return done.stdout + done.stderr
        time.sleep(min(pause, max(0.0, until - time.monotonic())))
        pause += 2
    return ""


def _newest_step(run: Path) -> int:
    names = [commit.parent.name for commit in (run / "checkpoints").glob("step_*/COMMIT.json")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)
