"""Every GPU measurement in one command, for ten minutes on a GPU.

    python -m benchmarks.gpu_visit --minutes 9 --out DIR [--data-dir DIR] [--only PART …]

Its parts (``--list``) start in order of importance, each in its own process with its own time limit. DIR/gpu.json
holds what each measured and printed, and how it ended; DIR/gpu.md shows it. Both are rewritten after each part, so an
interrupted visit loses no finished part, and the same command continues it. A part that fails or runs out of time does
not stop the next. Runs, with checkpoints of hundreds of MB, and the current part's output are in DIR/scratch, or in
``--scratch``.

It needs torch, numpy, scikit-learn, pandas, matplotlib, seaborn, pytest, tyro and PyHessian; conadv_lab need not be
installed if it is on PYTHONPATH. ``--data-dir`` is a folder with CIFAR-10 (`conadv_lab.data.cifar`); without it, the
parts that need it are skipped. ``--small`` makes every part tiny, to try all of them on a CPU. Exit status: 0 all parts
finished, 1 some did not, 2 invalid arguments.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from benchmarks.gpu_page import page
from benchmarks.gpu_parts import PARTS, ROOT, Part, Place
from conadv_lab import cli, provenance
from conadv_lab.files import write_json
from conadv_lab.mistakes import require, unknown

FINISHED = "finished"
LONGEST = 50_000
"""Characters kept from the end of a part's output."""


@dataclass(frozen=True)
class VisitOptions:
    minutes: float = 9.0  # For all parts.
    out: Path = Path("gpu")  # Folder for the results.
    data_dir: Path | None = None  # A folder with CIFAR-10.
    scratch: Path | None = None  # Folder for runs; None: OUT/scratch.
    only: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # Only these parts.
    small: bool = False  # Make every part tiny, to try it on a CPU.
    list: bool = False  # List the parts and exit.

    @property
    def parts(self) -> set[str]:
        """Names of the chosen parts; all if none were given."""
        return {name for several in self.only for name in several}


def main(words: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The command; returns its exit status."""
    asked = cli.asked(VisitOptions, words, "benchmarks.gpu_visit", __doc__)
    if asked.list:
        print("\n".join(f"{part.name:20} {part.about}" for part in parts))
        return 0
    try:
        chosen, place = _checked(asked, parts)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return visit(chosen, place, parts, 60 * asked.minutes)


def _checked(asked: VisitOptions, parts: Sequence[Part]) -> tuple[list[Part], Place]:
    """The folders and parts of a visit.

    Raises:
        ValueError: invalid options; nothing has been written.
    """
    known = {part.name: part for part in parts}
    for name in sorted(asked.parts):
        if name not in known:
            raise unknown("part", name, known)
    chosen = [part for part in parts if not asked.parts or part.name in asked.parts]
    out = asked.out.resolve()
    scratch = (asked.scratch or out / "scratch").resolve()
    for folder in (out, scratch):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; allowed: a folder, or a path that does not exist")
    place = Place(out, scratch, asked.data_dir and asked.data_dir.resolve(), asked.small)
    _require_data(asked, chosen)
    before = read(out)
    _require_one_size(before, out, asked.small)
    unfinished = [part for part in chosen if before.get(part.name, {}).get("status") != FINISHED]
    for first in [part for part in unfinished if not _missing(part, place)][:1]:
        allowed = f"at least {first.least / 60:.2g}, as {first.name} starts first"
        require(60 * asked.minutes >= first.least, "minutes", asked.minutes, allowed)
    if unfinished:
        _require_gpu(asked.small)
    return chosen, place


def _require_data(asked: VisitOptions, chosen: Sequence[Part]) -> None:
    if asked.data_dir is not None:
        from conadv_lab.data.cifar import require_archive

        require_archive(asked.data_dir)
        return
    wanting = [part.name for part in chosen if asked.parts and "cifar10" in part.needs]
    if wanting:
        raise ValueError(f"{', '.join(wanting)} needs CIFAR-10; pass its folder as --data-dir")


def _require_one_size(before: dict[str, dict[str, Any]], out: Path, small: bool) -> None:
    """Raise ``ValueError`` if tiny and full-size results would share a page or overwrite each other."""
    for name, record in before.items():
        if record.get("small", small) != small:
            how = "in full" if small else "in small"
            raise ValueError(
                f"{out} has {name} {how}; allowed {'with' if small else 'without'} --small: another --out"
            )


def _require_gpu(small: bool) -> None:
    import torch

    if not small and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU to measure; --small tries every part on a CPU")


def visit(chosen: Sequence[Part], place: Place, parts: Sequence[Part], seconds: float) -> int:
    """Run the chosen unfinished parts one after another until time is up; returns the exit status."""
    from benchmarks.harness import machine

    begun, described = time.monotonic(), machine()
    place.out.mkdir(parents=True, exist_ok=True)
    records = read(place.out)
    for part in chosen:
        before = records.get(part.name, {}).get("status")
        if before == FINISHED:
            _say(f"{part.name}: finished before")
            continue
        left = begun + seconds - time.monotonic()
        missing = _missing(part, place)
        if missing or left < part.least:
            reason = f"needs {missing}" if missing else f"{max(left, 0):.0f} s were left"
            _say(f"{part.name}: not run, {reason}")
            if before in (None, "not run"):
                records[part.name] = _about(part) | {"status": "not run", "reason": reason}
        else:
            _say(f"{part.name}: {part.about}")
            records[part.name] = _about(part) | {
                "status": "begun",
                "command": part.told(place.small),
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": provenance.source()["commit"],
                "small": place.small,
                "machine": described,
            }
            publish(place.out, records, parts)
            records[part.name] |= carry_out(part, place, min(part.seconds, left))
            _say(f"{part.name}: {records[part.name]['status']} after {records[part.name]['seconds']:.0f} s")
        publish(place.out, records, parts)
    publish(place.out, records, parts)
    _say(f"{place.out / 'gpu.md'}")
    return int(any(records[part.name]["status"] != FINISHED for part in chosen))


def carry_out(part: Part, place: Place, seconds: float) -> dict[str, Any]:
    """Run one part in a separate process; returns how it ended, what it measured and what it printed."""
    folder = place.scratch / part.name
    shutil.rmtree(folder, ignore_errors=True)  # left over from an unfinished try
    folder.mkdir(parents=True, exist_ok=True)
    command, start = part.command(place), time.monotonic()
    status = run_limited(command, folder, seconds, place.small)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    for kind in ("output", "errors"):
        found[kind] = _text(folder / f"{kind}.txt", place)[-LONGEST:]
    found["figures"] = _figures(folder, place)
    if status is None:
        return found | {"status": "out of time", "reason": f"killed after {seconds:.0f} s"}
    if status:
        return found | {"status": "failed", "reason": f"exit status {status}"}
    if found["figures"] is None:
        return found | {"status": "failed", "reason": "it wrote no results"}
    return found | {"status": FINISHED}


def run_limited(command: Sequence[str], folder: Path, seconds: float, small: bool = False) -> int | None:
    """A command's exit status, or None if it ran out of time and was killed with all its children."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    if small:
        environment["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes on a CPU
    with (folder / "output.txt").open("wb") as output, (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
            start_new_session=True, preexec_fn=_ends_with_its_parent,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also children that a finished part left running
            process.wait()


def _ends_with_its_parent() -> None:
    """On Linux, kill this process when the visit is killed; otherwise it would run alongside the next one."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _missing(part: Part, place: Place) -> str | None:
    if "cifar10" in part.needs and place.data is None:
        return "CIFAR-10 (--data-dir)"
    if "run" in part.needs and place.run() is None:
        return f"a finished run in {place.scratch}, as cifar and resnet18 leave one"
    return None


def _about(part: Part) -> dict[str, Any]:
    return {"part": part.name, "about": part.about, "shown": part.shown}


def _figures(folder: Path, place: Place) -> Any:
    """A part's results; None if the file is missing or incomplete."""
    try:
        # NaN is not JSON.
        return json.loads(_text(folder / "figures.json", place), parse_constant=lambda _: None)
    except (OSError, ValueError):
        return None


def _text(file: Path, place: Place) -> str:
    """A file's text with this machine's paths removed, for publication."""
    text = file.read_text(errors="replace")
    for path, name in ((place.scratch, "SCRATCH"), (place.data, "DATA"), (ROOT, ".")):
        text = text.replace(str(path), name) if path is not None else text
    return text


def read(out: Path) -> dict[str, dict[str, Any]]:
    """How each part that was ever started ended, by name.

    Raises:
        ValueError: the file does not belong to a visit.
    """
    file = out / "gpu.json"
    if not file.exists():
        return {}
    try:
        return {record["part"]: record for record in json.loads(file.read_text())["parts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or not from a visit: {error}; move it away") from error


def publish(out: Path, records: dict[str, dict[str, Any]], parts: Sequence[Part]) -> None:
    """Write gpu.json and gpu.md atomically, in the order of the parts."""
    order = {part.name: i for i, part in enumerate(parts)}
    found = sorted(records.values(), key=lambda record: order.get(record["part"], len(order)))
    write_json(out / "gpu.json", {"parts": found})
    beside = out / ".gpu.md"
    beside.write_text(page(found), encoding="utf-8")
    beside.replace(out / "gpu.md")


def _say(sentence: str) -> None:
    print(sentence, flush=True)


if __name__ == "__main__":
    sys.exit(main())
