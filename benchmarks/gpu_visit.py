"""Everything that only a GPU can say, for whoever has one for ten minutes.

    python -m benchmarks.gpu_visit --minutes 9 --out DIR [--data-dir DIR] [--only PART …]

Its parts (``--list``) are begun in the order in which they are wanted, each as a process of its own with its own time
limit. DIR/PART holds what a part measured (figures.json), printed (output.txt, errors.txt) and how it ended
(record.json); DIR/gpu.md and DIR/gpu.json hold all of it, and are written anew after each part. A part that fails or
runs out of time does not keep the next from beginning. A part that is finished is not begun again, so a visit that was
cut short goes on where it was. Runs, with their checkpoints of hundreds of MB, lie in DIR/scratch, or where
``--scratch`` says.

torch, numpy, scikit-learn, pandas, matplotlib, seaborn, pytest, tyro and PyHessian are enough; nothing has to be
installed but on PYTHONPATH. ``--data-dir`` is a folder with CIFAR-10 (`conadv_lab.data.cifar`); without it, the parts
that need it are left out. ``--small`` makes every part tiny, so that all can be tried on a CPU. Exit status: 0 all
parts are finished, 1 one is not, 2 a mistake in what was asked.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.gpu_parts import PARTS, ROOT, Part, Place
from conadv_lab import provenance
from conadv_lab.mistakes import require, unknown
from conadv_lab.runs import write_json

FINISHED = "finished"


def main(words: Iterable[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The command; returns its exit status."""
    asked = _parser().parse_args(None if words is None else list(words))
    if asked.list:
        print("\n".join(f"{part.name:20} {part.about}" for part in parts))
        return 0
    try:
        chosen, place = _checked(asked, parts)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return visit(chosen, place, parts, 60 * asked.minutes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu_visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("gpu"), help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="a folder with CIFAR-10")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder of the runs (default: OUT/scratch)"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="PART", help="these parts alone (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="every part tiny, also on a CPU")
    parser.add_argument("--list", action="store_true", help="name the parts and leave")
    return parser


def _checked(asked: argparse.Namespace, parts: Sequence[Part]) -> tuple[list[Part], Place]:
    """What is to be done and where.

    Raises:
        ValueError: a mistake in what was asked; nothing has been written.
    """
    known = {part.name: part for part in parts}
    for name in asked.only or ():
        if name not in known:
            raise unknown("part", name, known)
    chosen = [part for part in parts if not asked.only or part.name in asked.only]
    out = asked.out.resolve()
    scratch = (asked.scratch or out / "scratch").resolve()
    for folder in (out, scratch):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; allowed: a folder, or a name that is free")
    place = Place(out, scratch, asked.data_dir and asked.data_dir.resolve(), asked.small)
    _require_data(asked, chosen)
    first = next((part for part in chosen if _record(place, part).get("status") != FINISHED), None)
    if first is not None:
        allowed = f"at least {first.least / 60:.2g}, for {first.name} is begun first"
        require(60 * asked.minutes >= first.least, "minutes", asked.minutes, allowed)
        _require_gpu(asked.small)
    return chosen, place


def _require_data(asked: argparse.Namespace, chosen: Sequence[Part]) -> None:
    if asked.data_dir is not None:
        from conadv_lab.data.cifar import require_archive

        require_archive(asked.data_dir)
        return
    wanting = [part.name for part in chosen if asked.only and "cifar10" in part.needs]
    if wanting:
        raise ValueError(f"{', '.join(wanting)} needs CIFAR-10; name its folder by --data-dir")


def _require_gpu(small: bool) -> None:
    import torch

    if not small and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU, so there is nothing to visit; --small tries every part on a CPU")


def visit(chosen: Sequence[Part], place: Place, parts: Sequence[Part], seconds: float) -> int:
    """Begin each chosen part that is not finished, until the time is over; returns the exit status."""
    from benchmarks.harness import machine

    begun, described = time.monotonic(), machine()
    place.out.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        before = _record(place, part)
        if before.get("status") == FINISHED:
            _say(f"{part.name}: finished before")
            continue
        left = begun + seconds - time.monotonic()
        missing = _missing(part, place)
        if missing or left < part.least:
            reason = f"needs {missing}" if missing else f"{max(left, 0):.0f} s were left"
            _say(f"{part.name}: not run, {reason}")
            if before.get("status") in (None, "not run"):
                _keep(place, part, {"status": "not run", "reason": reason})
        else:
            _say(f"{part.name}: {part.about}")
            record = carry_out(part, place, min(part.seconds, left), described)
            _say(f"{part.name}: {record['status']} after {record['seconds']:.0f} s")
        publish(place, parts)
    publish(place, parts)
    _say(f"{place.out / 'gpu.md'}")
    return int(any(_record(place, part).get("status") != FINISHED for part in chosen))


def carry_out(part: Part, place: Place, seconds: float, described: dict[str, Any]) -> dict[str, Any]:
    """One part in a process of its own; returns the record of how it ended, which is on the disk by then."""
    for folder in (place.out / part.name, place.scratch / part.name):
        shutil.rmtree(folder, ignore_errors=True)  # what an unfinished try left
    (place.out / part.name).mkdir(exist_ok=True)
    command = part.command(place)
    record: dict[str, Any] = {
        "status": "begun",
        "command": ["python", *command[1:]],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": provenance.source()["commit"],
        "small": place.small,
        "machine": described,
    }
    _keep(place, part, record)
    start = time.monotonic()
    status = run_limited(command, place.out / part.name, seconds, place.small)
    record["seconds"] = round(time.monotonic() - start, 1)
    record["status"] = FINISHED if status == 0 else "failed"
    if status is None:
        record |= {"status": "out of time", "reason": f"killed after {seconds:.0f} s"}
    elif status:
        record["reason"] = f"exit status {status}"
    elif _figures(place, part) is None:
        record |= {"status": "failed", "reason": "it left no figures"}
    _keep(place, part, record)
    return record


def run_limited(command: Sequence[str], folder: Path, seconds: float, small: bool = False) -> int | None:
    """Exit status of a command, or None where it was killed, with all its children, as its time was over."""
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
                os.killpg(process.pid, signal.SIGKILL)  # also what a finished part left behind
            process.wait()


def _ends_with_its_parent() -> None:
    """On Linux, have this process killed when the visit is, or it would go on beside the next one."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _missing(part: Part, place: Place) -> str | None:
    if "cifar10" in part.needs and place.data is None:
        return "CIFAR-10 (--data-dir)"
    if "run" in part.needs and place.run() is None:
        return f"a finished run in {place.scratch}, as cifar and resnet18 leave one"
    return None


def _record(place: Place, part: Part) -> dict[str, Any]:
    """How the part ended; empty where it was never begun."""
    file = place.out / part.name / "record.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _figures(place: Place, part: Part) -> Any:
    """What the part has measured so far; None where there is nothing, or half a file."""
    file = place.out / part.name / "figures.json"
    try:
        return json.loads(file.read_text(), parse_constant=lambda _: None)  # NaN is not JSON
    except (OSError, ValueError):
        return None


def _keep(place: Place, part: Part, record: dict[str, Any]) -> None:
    folder = place.out / part.name
    folder.mkdir(exist_ok=True)
    write_json(folder / "record.json", {"part": part.name, "about": part.about, "shown": part.shown} | record)


def publish(place: Place, parts: Sequence[Part]) -> None:
    """Write gpu.json and gpu.md from what lies in the parts' folders."""
    found = []
    for part in parts:
        record = _record(place, part)
        if not record:
            continue
        folder = place.out / part.name
        texts = {
            kind: (folder / f"{kind}.txt").read_text(errors="replace")
            if (folder / f"{kind}.txt").exists()
            else ""
            for kind in ("output", "errors")
        }
        found.append(record | texts | {"figures": _figures(place, part)})
    write_json(place.out / "gpu.json", {"parts": found})
    beside = place.out / ".gpu.md"
    beside.write_text(page(found), encoding="utf-8")
    beside.replace(place.out / "gpu.md")


def _say(sentence: str) -> None:
    print(sentence, flush=True)


if __name__ == "__main__":
    sys.exit(main())
