"""The state of runs, in words, from their folders and one query to SLURM.

Without accounting SLURM forgets a job minutes after it ends, and it reports FAILED for a run that ran out of memory;
so the worker's events and SLURM's lines in the log are read as well.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conadv_lab.config import Config
from conadv_lab.launch import local, slurm, words
from conadv_lab.launch.records import Record, last, log_files, tail, whole_lines
from conadv_lab.runs import RunFolder

Queue = Mapping[str, tuple[str, str]]
UNFINISHED = ("failed", "out of memory", "node failure", "timed out", "preempted", "cancelled", "lost", "stopped",
              "not sent")  # fmt: skip
ABOUT = ("started", "stopped", "failed", "cancelled")
FAILED = ("failed", "out of memory", "node failure", "lost")


@dataclass(frozen=True)
class State:
    """The state of one run: a word, the reason, and how often it was interrupted."""

    run: Path
    word: str
    detail: str = ""
    job: str = ""
    preempted: int = 0
    timed_out: int = 0
    restarted: int = 0

    def __str__(self) -> str:
        parts = [f"{self.word} ({self.detail})" if self.detail else self.word]
        for count, what in ((self.preempted, "preempted"), (self.timed_out, "timed out"),
                            (self.restarted, "restarted after a node failure")):  # fmt: skip
            if count:
                parts.append(f"{what} ×{count}")
        return ", ".join(parts)


def states(paths: Sequence[Path]) -> list[State]:
    """The state of each run folder.

    Raises:
        ConnectionError: SLURM does not answer, and some runs sent to it are unfinished.
    """
    records = [Record(path) for path in paths]
    queue = slurm.queue() if any(_asks_slurm(record) for record in records) else {}
    # Read events after the query, so that a stop that SLURM reports is already recorded.
    return [state(record, record.events(), queue) for record in records]


def state(record: Record, events: list[dict[str, Any]], queue: Queue | None) -> State:
    """The state of one run, given its events and SLURM's queue; None if SLURM does not answer."""
    sent = last(events, "submitted")
    job = sent["job"] if sent else ""
    word, detail = _now(record, events, sent, queue)
    causes = [event.get("cause") for event in events if event["event"] == "stopped"]
    causes += [event.get("after") for event in events if event["event"] == "started"]
    # The state itself already names the stop that ended it.
    ended_by = word if word in ("preempted", "timed out") and causes.count(word) else ""
    return State(
        record.path,
        word,
        detail,
        job,
        preempted=causes.count("preempted") - (ended_by == "preempted"),
        timed_out=causes.count("timed out") - (ended_by == "timed out"),
        restarted=causes.count("node failure"),
    )


def _asks_slurm(record: Record) -> bool:
    if (record.path / "result.json").exists():
        return False
    sent = last(record.events(), "submitted")
    return sent is not None and not sent["local"]


def _now(
    record: Record, events: list[dict[str, Any]], sent: dict[str, Any] | None, queue: Queue | None
) -> tuple[str, str]:
    if (record.path / "result.json").exists():
        return "done", ""
    if sent is None:
        return ("not sent", "") if record.exists else ("unfinished", "started by train, not by submit")
    newest = last([event for event in events if event.get("job") == sent["job"]], *ABOUT)
    if queue is None and not sent["local"] and (newest is None or newest["event"] in ("started", "stopped")):
        return "unknown", "SLURM does not answer"
    known, why = _of_process(sent) if sent["local"] else (queue or {}).get(sent["job"], ("", ""))
    if known in words.WAITING:
        cause = _why_again(newest)
        return "pending", f"{cause}, {words.reason(why)}" if cause else words.reason(why)
    if known in words.AT_WORK:
        return _at_work(record, newest, known)
    return _ended(record, newest, sent, words.STATES.get(known, ""))


def _of_process(sent: dict[str, Any]) -> tuple[str, str]:
    if sent["host"] != socket.gethostname():
        return "", ""
    return ("RUNNING", "") if local.is_alive(int(sent["job"]), Path(sent["jobs"])) else ("", "")


def _at_work(record: Record, newest: dict[str, Any] | None, known: str) -> tuple[str, str]:
    if newest is None:
        return "running", "starting"
    if newest["event"] == "failed":
        return "failed", newest["error"]
    if _was_cancelled(newest):
        return "cancelled", "still ending" if known == "COMPLETING" else ""
    if newest["event"] == "stopped":
        return "pending", _why_again(newest)
    return "running", progress(record)


def _why_again(newest: dict[str, Any] | None) -> str:
    if newest is None:
        return ""
    return (
        f"requeued after it was {newest['cause']}"
        if newest["event"] == "stopped"
        else "requeued after it was ended"
    )


def _was_cancelled(newest: dict[str, Any] | None) -> bool:
    return newest is not None and (newest["event"] == "cancelled" or newest.get("cause") == "cancelled")


def _ended(
    record: Record, newest: dict[str, Any] | None, sent: dict[str, Any], slurm_says: str
) -> tuple[str, str]:
    if _was_cancelled(newest):
        return "cancelled", _last_step(record)
    if newest is not None and newest["event"] == "failed":
        return "failed", newest["error"]
    log = tail(log_files(Path(sent["jobs"]), sent["job"])[1])
    marked = words.killed_by(log) or ""
    # SLURM reports FAILED for an out-of-memory kill, and nothing once it has forgotten the job.
    word = marked if marked == "out of memory" or slurm_says in ("", "failed", "lost") else slurm_says
    if word:
        return word, _last_step(record)
    if newest is not None and newest["event"] == "stopped":
        return "stopped", newest["why"]
    if slurm_says == "failed":
        return "failed", _last_line(log) or "killed without a message"
    return "lost", "ended without a message" if newest is not None else "never started"


def progress(record: Record) -> str:
    """Step, speed and time left of a run, from the last line of its metrics file."""
    line = _newest_metrics(record)
    if line is None:
        return "starting"
    step, rate = line["step"] + 1, line.get("images_per_second", 0.0)
    config = Config.from_dict(record.job["config"])
    total = config.training.steps
    if total is None and line["epoch"] > 0:
        total = round(line["step"] / line["epoch"] * config.training.epochs)
    told = [f"step {step}/{total}" if total else f"step {step}", f"{rate:.0f} images/s"]
    if total and rate > 0:
        told.append(f"{_clock(max(0, total - step) * _clean_batch(record, config) / rate)} left")
    return ", ".join(told)


def _clean_batch(record: Record, config: Config) -> int:
    """Clean images per step, from the run's records: the method may be a user's file, which must not run here."""
    try:
        return RunFolder(record.path).manifest()["clean_batch"]
    except (ValueError, KeyError):
        return config.training.global_batch


def _newest_metrics(record: Record) -> dict[str, Any] | None:
    lines = whole_lines(tail(record.path / "metrics.jsonl", 4096))
    return lines[-1] if lines else None


def _last_step(record: Record) -> str:
    line = _newest_metrics(record)
    return "before the first step" if line is None else f"after step {line['step'] + 1}"


def _last_line(log: str) -> str:
    """How an attempt's log explains its end: the rank srun saw die first, else the last line."""
    lines: list[str] = []
    for line in log.splitlines():
        lines = [] if line.startswith(words.START_MARK) else [*lines, line.strip()]
    died = [line for line in lines if line.startswith("srun: error:")][:1]
    return (died or [line for line in lines if line][-1:] or [""])[0]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
