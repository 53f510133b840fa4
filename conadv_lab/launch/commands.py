"""The verbs of ``python -m conadv_lab.submit``: parse, call, print."""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from conadv_lab import cli
from conadv_lab.config import Config, tell_without_effect
from conadv_lab.launch import beforehand, local, profiles, send, slurm
from conadv_lab.launch import status as states
from conadv_lab.launch.options import RunOptions
from conadv_lab.launch.profiles import Profile
from conadv_lab.launch.records import Record, find_runs, last, log_files, short_name, tail
from conadv_lab.launch.sweep import Planned, plan
from conadv_lab.mistakes import counted, creatable, require_count, writable

Kind = TypeVar("Kind")
UNUSABLE = ("%", ":", "'", '"', "\\", "\n")
"""Not usable in a path: SLURM expands %, PYTHONPATH splits at colons, and #SBATCH lines interpret quotes."""
Folders = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...", help_behavior_hint="")
]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def run(words: list[str]) -> int:
    """Submit one run."""
    recipe = _recipe("run", words)
    planned, options = plan(recipe, words[1:], RunOptions(), verb="run")
    if len(planned) > 1:
        raise ValueError(
            f"{recipe} returns {len(planned)} configs; allowed: one. Use submit sweep for a list"
        )
    out = _out(options)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"{out} already exists; continue an ended run with submit retry {out}, or pass another --out"
        )
    tell_without_effect(planned[0].config, words[1:])
    return _send(out, [(out, planned[0])], recipe, options)


def sweep(words: list[str]) -> int:
    """Submit every combination of the listed values."""
    recipe = _recipe("sweep", words)
    planned, options = plan(recipe, words[1:], RunOptions())
    out = _out(options)
    if Record(out).exists or (out / "config.json").exists():
        raise ValueError(f"{out} is a run; allowed: a folder for many runs")
    for one in planned:
        tell_without_effect(one.config, words[1:])
    todo = send.not_yet_sent(out, planned)
    if len(todo) < len(planned):
        print(f"{len(planned) - len(todo)} of {len(planned)} runs were already sent")
    return _send(out, todo, recipe, options) if todo else 0


def status(words: list[str]) -> int:
    """Print one row per run."""

    @dataclass(frozen=True)
    class Status:
        """One row per run, with its state in words."""

        places: Folders
        """Run folders, or folders of them, at any depth."""

    places = list(_parsed(Status, words, "status").places)
    paths = find_runs(places)
    try:
        found = states.states(paths)
    except ConnectionError as error:
        print(f"warning: {error}; queue states are unknown", file=sys.stderr)
        found = [states.state(Record(path), Record(path).events(), None) for path in paths]
    rows = [(short_name(one.run, places), str(one), one.job) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, words_of_it, job in rows:
        print(f"{name:{widths[0]}}  {words_of_it:{widths[1]}}  {job}".rstrip())
    if len(rows) > 1:
        print(", ".join(f"{count} {word}" for word, count in Counter(one.word for one in found).most_common()),
              file=sys.stderr)  # fmt: skip
    return 0


def logs(words: list[str]) -> int:
    """Print the end of a run's output."""

    @dataclass(frozen=True)
    class Logs:
        """The end of a run's output, from its latest job."""

        run: Folder
        """The run folder."""
        rank: int = 0
        """Which rank's output to show."""
        lines: int = 40
        """How many lines to show of standard output and of standard error."""

    asked = _parsed(Logs, words, "logs")
    require_count(lines=asked.lines)
    sent = last(Record(asked.run).events(), "submitted")
    if sent is None:
        raise ValueError(f"{asked.run} has no logs: it was not sent with submit")
    for file in log_files(Path(sent["jobs"]), sent["job"], asked.rank):
        print(f"--- {file}")
        print("\n".join(tail(file, 400 * asked.lines).splitlines()[-asked.lines :]))
    return 0


def cancel(words: list[str]) -> int:
    """Cancel pending and running runs."""

    @dataclass(frozen=True)
    class Cancel:
        """Cancel pending and running runs. They keep their checkpoints, and `retry` continues them."""

        places: Folders
        """Run folders, or folders of them, at any depth."""

    found = states.states(find_runs(list(_parsed(Cancel, words, "cancel").places)))
    live = [one for one in found if one.word in ("pending", "running")]
    queued: list[str] = []
    for one in live:
        record = Record(one.run)
        sent = last(record.events(), "submitted")
        assert sent is not None
        record.note("cancelled", job=one.job)
        if sent["local"]:
            local.cancel(int(one.job))
        else:
            queued.append(one.job)
    slurm.cancel(queued)
    print(f"cancelled {len(live)} of {counted(len(found), 'run')}")
    return 0


def retry(words: list[str]) -> int:
    """Resubmit runs that ended before they were done."""

    @dataclass(frozen=True)
    class Retry:
        """Resubmit runs that ended before they were done; each continues from its latest checkpoint."""

        places: Folders
        """Run folders, or folders of them, at any depth."""
        failed: bool = False
        """Only runs that failed (exception, out of memory, node failure, lost), not cancelled or stopped ones."""
        profile: str | None = None
        """Use this profile instead of the one they were sent with."""
        new_code: bool = False
        """Use the current code instead of the copy they were sent with."""
        dry_run: bool = False
        """List the runs without sending anything."""

    asked = _parsed(Retry, words, "retry")
    profile = profiles.load(asked.profile) if asked.profile else None
    wanted = states.FAILED if asked.failed else states.UNFINISHED
    chosen = [one for one in states.states(find_runs(list(asked.places))) if one.word in wanted]
    for one in chosen:
        print(f"{one.run}  {one}")
    if asked.dry_run or not chosen:
        print(f"{counted(len(chosen), 'run')} to send again")
        return 0
    batches = send.again([one.run for one in chosen], profile, asked.new_code)
    for batch in batches:
        # Another profile may have more ranks than can share a step; the data were checked at first sending.
        if profile is not None:
            configs = [Config.from_dict(Record(path).job["config"]) for path in batch.paths]
            beforehand.check(configs, batch.profile, data_here=False)
        batch.check()
    for batch in batches:
        send.resend(batch)
    codes = [_told(batch.paths, batch.profile) for batch in batches]
    return 1 if 1 in codes else max(codes)


def collect(words: list[str]) -> int:
    """Print a table of configs and results."""

    @dataclass(frozen=True)
    class Collect:
        """A table of the settings in which the runs differ and their main metrics."""

        places: Folders
        """Run folders, or folders of them, at any depth."""
        csv: Path | None = None
        """Also write all columns to this file."""

    from conadv_lab.frames import frame_of

    asked = _parsed(Collect, words, "collect")
    writable(asked.csv)
    places = list(asked.places)
    frame = frame_of(str(path) for path in find_runs(places))
    if frame.empty:
        print("no run has started yet")
        return 0
    if asked.csv is not None:
        frame.to_csv(asked.csv, index=False)
    frame["run"] = [short_name(Path(run), places) for run in frame["run"]]
    metrics = [name for name in ("test_accuracy", "test_loss", "steps", "seconds") if name in frame]
    varied = [name for name in frame if name not in ("run", "state", "parameters_sha256", *metrics)
              and frame[name].astype(str).nunique() > 1 and name in _fields()]  # fmt: skip
    print(frame[["run", "state", *varied, *metrics]].to_string(index=False))
    return 0


def show(words: list[str]) -> int:
    """Print a run's provenance."""

    @dataclass(frozen=True)
    class Show:
        """A run's config, provenance, result and history."""

        run: Folder
        """The run folder."""
        reproduce: bool = False
        """Print only the command that reproduces the run."""

    from conadv_lab.launch.reproduce import command

    asked = _parsed(Show, words, "show")
    find_runs([asked.run])
    if asked.reproduce:
        print(command(asked.run))
        return 0
    for name in ("config.json", "manifest.json", "result.json"):
        if (asked.run / name).exists():
            print(f"--- {name}\n{(asked.run / name).read_text().rstrip()}")
    for event in Record(asked.run).events():
        print(json.dumps({key: value for key, value in event.items() if key != "slurm"}))
    return 0


def _send(root: Path, runs: list[tuple[Path, Planned]], recipe: str, options: RunOptions) -> int:
    profile = options.site()
    beforehand.check([planned.config for _, planned in runs], profile, not options.data_on_nodes)
    order = send.new(root, runs, recipe, profile)
    if not profile.is_local and (slurm.is_here() or not options.dry_run):
        try:
            order.batch.check()
        except ConnectionError as failure:
            if not options.dry_run:
                raise
            print(f"warning: {failure}", file=sys.stderr)
    if options.dry_run:
        _print_dry(order)
        return 0
    try:
        order.send()
    except KeyboardInterrupt:
        print("stopped; continue with submit retry", file=sys.stderr)
        return 75
    return _told([path for path, _ in runs], profile)


def _print_dry(order: send.New) -> None:
    profile, first = order.batch.profile, order.config(order.runs[0][1])
    print(f"# profile {profile.name}: {profile.executor}, code {order.snapshot.digest[:16]}")
    print("# resolved config" + (" of the first run" if len(order.runs) > 1 else ""))
    print(json.dumps(first.to_dict(), indent=1))
    print(f"# {counted(len(order.runs), 'run')}")
    for number, (path, _) in enumerate(order.runs):
        print(f"{number:5d}  {path}")
    if profile.is_local:
        print(f"# what starts each run's Python\n{local.python(profile, order.batch.code)}")
        return
    scripts = order.batch.scripts()
    for number, script in enumerate(scripts, 1):
        print(f"# sbatch script {number} of {len(scripts)}")
        print(script, end="")


def _told(paths: list[Path], profile: Profile) -> int:
    """Print how the runs that were sent ended, or their job ids; return the exit status."""
    if not profile.is_local:
        jobs = Counter(str(last(Record(path).events(), "submitted")["job"]).split("_")[0] for path in paths)  # type: ignore[index]
        for job, count in jobs.items():
            print(f"queued {counted(count, 'run')} as job {job}")
        print(paths[0] if len(paths) == 1 else paths[0].parent)
        return 0
    found = states.states(paths)
    for one in found:
        print(f"{one.run}  {one}")
    if all(one.word == "done" for one in found):
        return 0
    return 1 if any(one.word in states.FAILED for one in found) else 75


def _recipe(verb: str, words: list[str]) -> str:
    if words and words[0] in ("-h", "--help"):
        words[0:1] = ["digits-conadv", "--help"]
    if "--resume" in words:
        raise ValueError(
            f"unknown option --resume of submit {verb}; submit retry DIR continues what was sent"
        )
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"submit {verb} needs a recipe first; list them with python -m conadv_lab.train --list"
        )
    return words[0]


def _out(options: RunOptions) -> Path:
    if options.out is None:
        raise ValueError("--out is missing; allowed: a folder that all nodes can see")
    creatable(options.out)
    out = options.out.absolute()
    if found := [character for character in UNUSABLE if character in str(out)]:
        raise ValueError(
            f"--out is {str(out)!r}; allowed: a path without {found[0]!r}, which SLURM or PYTHONPATH would "
            "misread"
        )
    return out


def _parsed(kind: type[Kind], words: list[str], verb: str) -> Kind:
    return cli.parsed(kind, words, f"conadv_lab.submit {verb}")


def _fields() -> set[str]:
    return {name for section in Config().to_dict().values() for name in section}
