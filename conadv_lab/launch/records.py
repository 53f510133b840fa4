"""The launch records of a run folder, in ``.launch/``.

``job.json``: what was sent · ``events.jsonl``: its history: submitted, started, stopped, failed, finished, cancelled.
The name begins with a dot so that training treats a folder that was only queued as empty.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = ".launch"


@dataclass(frozen=True)
class Record:
    """The launch files of the run folder at ``path``."""

    path: Path

    @property
    def folder(self) -> Path:
        return self.path / FOLDER

    @property
    def exists(self) -> bool:
        return (self.folder / "job.json").is_file()

    @cached_property
    def job(self) -> dict[str, Any]:
        """What was sent: recipe, config, snapshot, profile.

        Raises:
            ValueError: the folder was not made by submit.
        """
        file = self.folder / "job.json"
        if not file.is_file():
            raise ValueError(f"{self.path} was not made by submit: it has no {FOLDER}/job.json")
        return json.loads(file.read_text())

    def write_job(self, job: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".job.json.{os.getpid()}"
        beside.write_text(json.dumps(job, indent=1) + "\n")
        beside.replace(self.folder / "job.json")

    def note(self, event: str, **details: Any) -> None:
        """Append an event, in one write, so that ranks and commands do not mix their lines."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **details}) + "\n"
        handle = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        try:
            text = (self.folder / "events.jsonl").read_text()
        except FileNotFoundError:
            return []
        return whole_lines(text)


def whole_lines(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file or of its end; a line cut short by a kill or a full disk is skipped.

    >>> whole_lines('p": 1}\\n{"step": 2}\\n{"st{"step": 3}\\n')
    [{'step': 2}]
    """
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict)]


def last(events: list[dict[str, Any]], *names: str) -> dict[str, Any] | None:
    """The latest event with one of these names, or None."""
    return next((event for event in reversed(events) if event["event"] in names), None)


def find_runs(places: list[Path]) -> list[Path]:
    """All run folders among and below the given folders, at any depth, sorted by name.

    Raises:
        ValueError: a folder does not exist or contains no run.
    """
    found: dict[Path, None] = {}
    if not places:
        raise ValueError("no folder given; allowed: run folders, or folders that contain them")
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place} is not a folder; allowed: a run folder or a folder of run folders")
        runs = [place] if is_run(place) else sorted(_runs_below(place))
        if not runs:
            raise ValueError(f"{place} contains no run; allowed: a run folder or a folder of run folders")
        found |= dict.fromkeys(runs)
    return list(found)


def _runs_below(place: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(place):
        runs = {name for name in names if is_run(Path(folder, name))}
        yield from (Path(folder, name) for name in runs)
        names[:] = [name for name in names if name not in runs and not name.startswith(".")]


def short_name(run: Path, places: list[Path]) -> str:
    """A run's path relative to the given folder that contains it, or the name of its folder."""
    above = [place for place in places if place != run and run.is_relative_to(place)]
    return str(run.relative_to(above[0])) if above else run.name


def is_run(path: Path) -> bool:
    """Whether a folder was queued by submit or started by train."""
    return (path / FOLDER / "job.json").is_file() or (path / "config.json").is_file()


def log_files(jobs: Path, job_id: str, rank: int = 0) -> tuple[Path, Path]:
    """(standard output, standard error) of one rank of a job, as submitit names them."""
    return jobs / f"{job_id}_{rank}_log.out", jobs / f"{job_id}_{rank}_log.err"


def tail(file: Path, size: int = 8192) -> str:
    """The last ``size`` bytes of a text file, starting at a line; empty if there is no file."""
    try:
        with file.open("rb") as opened:
            start = max(0, opened.seek(0, os.SEEK_END) - size)
            opened.seek(start)
            content = opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return (content.partition(b"\n")[2] if start else content).decode(errors="replace")
