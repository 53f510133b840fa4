"""Sends runs: writes the folders, copies the code, hands them to SLURM or this machine, and records it."""

import dataclasses
import json
import math
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conadv_lab.config import Config
from conadv_lab.launch import local, profiles, slurm
from conadv_lab.launch.profiles import Profile
from conadv_lab.launch.records import FOLDER, Record
from conadv_lab.launch.snapshot import Snapshot, originals, take
from conadv_lab.launch.sweep import Planned


@dataclass(frozen=True)
class Array:
    """A part of a sweep sent to SLURM as one job array: runs ``start`` to ``stop``, ``parallel`` at a time."""

    start: int
    stop: int
    parallel: int
    after: int | None
    """The index of the array that must end first."""


def arrays(count: int, longest: int, cap: int) -> list[Array]:
    """Split ``count`` runs into arrays of at most ``longest``, with at most ``cap`` runs at once over all arrays.

    The arrays are of about equal size and share the cap; if there are more arrays than ``cap``, some wait for others.

    >>> [(one.stop - one.start, one.parallel) for one in arrays(2500, longest=1001, cap=64)]
    [(834, 22), (833, 21), (833, 21)]
    """
    number = math.ceil(count / longest)
    lanes = min(number, cap)
    made, start = [], 0
    for index in range(number):
        stop = start + count // number + (index < count % number)
        parallel = cap // lanes + (index % lanes < cap % lanes)
        made.append(Array(start, stop, parallel, index - lanes if index >= lanes else None))
        start = stop
    return made


@dataclass(frozen=True)
class Batch:
    """Runs that are sent together: one profile, one copy of the code, one folder for submitit's files."""

    profile: Profile
    jobs: Path
    code: Path
    paths: list[Path]
    name: str

    def scripts(self) -> list[str]:
        """The exact sbatch scripts, in the order in which they are sent."""
        return [self._executor(part).script(part.stop - part.start) for part in self._arrays()]

    def check(self) -> None:
        """Ask SLURM whether it could run this; writes nothing.

        Raises:
            ValueError: it could not.
            ConnectionError: SLURM does not answer.
        """
        if not self.profile.is_local:
            slurm.check(self.scripts()[0])

    def send(self) -> list[Path]:
        """Queue all runs, or run them on this machine; returns the folders that were sent.

        Raises:
            ValueError: SLURM refused one; the arrays sent before it stay queued and recorded.
        """
        if self.profile.is_local:
            local.run_all(self.profile, self.jobs, self.code, self.paths, self._note)
            return self.paths
        first_jobs: list[str] = []
        for part in self._arrays():
            executor = self._executor(part)
            executor.after = None if part.after is None else first_jobs[part.after]
            paths = self.paths[part.start : part.stop]
            jobs = executor.send(paths)
            first_jobs.append(jobs[0].split("_")[0])
            for path, job in zip(paths, jobs, strict=True):
                self._note(path, job)
        return self.paths

    def _arrays(self) -> list[Array]:
        longest = self.profile.max_array or (
            slurm.max_array() if slurm.is_here() else slurm.DEFAULT_MAX_ARRAY
        )
        return arrays(len(self.paths), longest, self.profile.max_parallel)

    def _executor(self, part: Array) -> slurm.Executor:
        return slurm.executor(self.profile, self.jobs, self.code, self.name, part.parallel)

    def _note(self, path: Path, job: str) -> None:
        Record(path).note(
            "submitted",
            job=job,
            jobs=str(self.jobs),
            local=self.profile.is_local,
            host=socket.gethostname(),
            profile=self.profile.name,
        )


@dataclass(frozen=True)
class New:
    """New runs and the code to run them with, not yet written or sent."""

    recipe: str
    snapshot: Snapshot
    runs: list[tuple[Path, Planned]]
    batch: Batch

    def config(self, planned: Planned) -> Config:
        """The config to send: on SLURM with as many threads as CPUs, so that an interrupted run keeps its bits."""
        config = planned.config
        if config.training.threads is None and not self.batch.profile.is_local:
            config = config.replace(threads=self.batch.profile.cpus_per_task)
        return self.snapshot.redirect(config)

    def write(self) -> None:
        """Write the code and the run folders."""
        self.snapshot.write()
        profile = dataclasses.asdict(self.batch.profile) | {"signal_delay_s": self.batch.profile.delay}
        for path, planned in self.runs:
            Record(path).write_job(
                {
                    "recipe": self.recipe,
                    "identity": planned.identity,
                    "folder": str(Path.cwd()),
                    "config": self.config(planned).to_dict(),
                    "originals": originals(planned.config),
                    "snapshot": {"path": str(self.snapshot.path), "digest": self.snapshot.digest},
                    "jobs": str(self.batch.jobs),
                    "profile": profile,
                }
            )

    def remove_unsent(self) -> None:
        """Delete what was written for runs that were not sent."""
        for path, _ in self.runs:
            if not Record(path).events():
                shutil.rmtree(path / FOLDER, ignore_errors=True)
                _remove_if_empty(path)
        root = self.snapshot.root.parent
        if not any(Record(path).events() for path, _ in self.runs) and not _jobs_of(self.batch.jobs):
            shutil.rmtree(root, ignore_errors=True)
            _remove_if_empty(root.parent)

    def send(self) -> None:
        """Write and send; delete what could not be sent.

        Raises:
            ValueError: SLURM refused.
        """
        try:
            self.write()
            self.batch.send()
        except BaseException:
            self.remove_unsent()
            raise


def new(root: Path, runs: list[tuple[Path, Planned]], recipe: str, profile: Profile) -> New:
    """Prepare new runs below ``root``; writes nothing.

    Raises:
        ValueError: a file that a config refers to does not exist.
    """
    root = root.absolute()
    snapshot = take(root / FOLDER / "code", [planned.config for _, planned in runs])
    paths = [path.absolute() for path, _ in runs]
    batch = Batch(profile, root / FOLDER / "jobs", snapshot.path, paths, f"conadv-{root.name}")
    return New(recipe, snapshot, [(path.absolute(), planned) for path, planned in runs], batch)


def not_yet_sent(root: Path, runs: Sequence[Planned]) -> list[tuple[Path, Planned]]:
    """The runs of a sweep that were not sent yet, each with its folder.

    Raises:
        ValueError: a folder with the name of a run already holds a different run.
    """
    folders = [child for child in root.iterdir() if child.is_dir()] if root.is_dir() else []
    known = {Record(path).job["identity"]: path for path in folders if Record(path).exists}
    todo = []
    for run in runs:
        path = known.get(run.identity, root / run.name)
        if run.identity in known and Record(path).events():
            continue
        if path.exists() and run.identity not in known:
            raise ValueError(
                f"{path} already exists and holds a different run; pass another --out for this sweep"
            )
        todo.append((path, run))
    return todo


def again(paths: Sequence[Path], profile: Profile | None, new_code: bool) -> list[Batch]:
    """Batches that resend runs, with the profile and code each was first sent with unless others are given.

    Raises:
        ValueError: a folder was not made by submit, or its code is gone.
    """
    groups: dict[str, Batch] = {}
    for path in paths:
        record = Record(path.absolute())
        job = record.job
        used = profile or profiles.from_dict(job["profile"], f"{path}'s job.json")
        jobs = Path(job["jobs"])
        if new_code:
            record = _renew(record, jobs.parent / "code")
        code = Path(record.job["snapshot"]["path"])
        if not code.is_dir():
            raise ValueError(
                f"the code that {path} was sent with is no longer in {code}; allowed: --new-code"
            )
        key = json.dumps([dataclasses.asdict(used), str(jobs), str(code)], sort_keys=True)
        groups.setdefault(key, Batch(used, jobs, code, [], f"conadv-{jobs.parents[1].name}")).paths.append(
            record.path
        )
    return list(groups.values())


def resend(batch: Batch) -> None:
    """Send the runs of a batch again, and record the batch's profile for their worker.

    Raises:
        ValueError: SLURM refused.
    """
    profile = dataclasses.asdict(batch.profile) | {"signal_delay_s": batch.profile.delay}
    for path in batch.paths:
        record = Record(path)
        record.write_job(record.job | {"profile": profile})
    batch.send()


def _renew(record: Record, root: Path) -> Record:
    """The record, updated to a new snapshot of the code."""
    config = Config.from_dict(record.job["config"])
    there = {
        name: reference
        for name, reference in record.job.get("originals", {}).items()
        if Path(reference.rpartition(":")[0]).is_file()
    }
    config = config.replace(**there) if there else config
    snapshot = take(root, [config], Path(record.job["folder"]))
    snapshot.write()
    about = {"path": str(snapshot.path), "digest": snapshot.digest}
    record.write_job(record.job | {"config": snapshot.redirect(config).to_dict(), "snapshot": about})
    return Record(record.path)


def _jobs_of(folder: Path) -> list[Path]:
    return list(folder.glob("*_submitted.pkl")) if folder.is_dir() else []


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
