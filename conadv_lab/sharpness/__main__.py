"""Measure curvature and sharpness: ``python -m conadv_lab.sharpness RUN_OR_CHECKPOINT… --json FILE``."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from conadv_lab.cli import parsed
from conadv_lab.mistakes import warnings_in_a_line
from conadv_lab.pipes import outlive_readers
from conadv_lab.reading import pairs
from conadv_lab.sharpness.options import SharpnessOptions

ABOUT = """Measure curvature and sharpness. By default only cheap measures run; --list shows all, and --also adds some.

A PLACE is a run folder, a checkpoint folder of a run, or path/to/file.py:function that returns model, criterion and
batches, optionally followed by a mapping of facts.

Exit status: 0 success, 2 invalid arguments, 1 failure, 130 interrupted (finished measures are still written)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    warnings_in_a_line()
    try:
        asked = parsed(SharpnessOptions, words, "conadv_lab.sharpness", ABOUT)
        if asked.list:
            return _list()
        if not asked.places:
            raise ValueError(
                "nothing to measure; name a run folder, a checkpoint or path/to/file.py:function"
            )
        done = _measure(asked)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0 if done else 130


def _list() -> int:
    from conadv_lab.sharpness.measures.front import DEFAULT
    from conadv_lab.sharpness.measures.study import REGISTRY

    for name, function in sorted(REGISTRY.items()):
        sentence = (function.__doc__ or "").strip().splitlines()[0]
        plain = re.sub(r":\w+:(?=`)|`", "", sentence)
        print(f"{name:36}{'*' if name in DEFAULT else ' '} {plain}")
    print("* measured by default; add others with --also, or pass --all")
    return 0


def _measure(asked: SharpnessOptions) -> bool:
    """Measure, print and write; False if interrupted."""
    print(f"reading {asked.places[0]} …", file=sys.stderr, flush=True)  # before seconds of imports
    import torch

    from conadv_lab.mistakes import creatable, unknown, writable
    from conadv_lab.sharpness.measures.front import DEFAULT, measure, names
    from conadv_lab.sharpness.measures.landscape import line_to
    from conadv_lab.sharpness.measures.results import Measure, Report
    from conadv_lab.sharpness.problem.problem import Problem
    from conadv_lab.sharpness.report.crosscheck import cross_check, side_by_side

    writable(asked.json, asked.html, asked.csv)
    for option, folder in (("--figures", asked.figures), ("--resume", asked.resume)):
        if folder is not None:
            creatable(folder, option)
    types = {"float32": torch.float32, "float64": torch.float64}
    if asked.dtype and asked.dtype not in types:
        raise unknown("dtype", asked.dtype, types)
    wanted = tuple(_words(asked.measures)) or DEFAULT
    wanted += tuple(name for name in (names() if asked.all else _words(asked.also)) if name not in wanted)
    if asked.all and asked.also:
        raise ValueError(f"--all already includes --also {asked.also}; pass one of the two")
    options: dict[str, Any] = {
        "params": _words(asked.params) or None, "bn": asked.bn, "dtype": types.get(asked.dtype), "seed": asked.seed,
    }  # fmt: skip
    subjects = _subjects(asked, asked.places)
    others = _subjects(asked, [asked.line_to] if asked.line_to else [])
    settings = pairs("--set", asked.set)
    reports: list[tuple[str, Report]] = []
    checks: list[Any] = []
    finished = False
    done: list[Measure] = []

    def shown(one: Measure) -> None:
        done.append(one)
        _print(one)

    try:
        for index, (subject, facts) in enumerate(subjects):
            print(subject.name, flush=True)
            found = measure(
                subject.model, subject.criterion, subject.batches, wanted, facts=facts, progress=True, shown=shown,
                refused=_left_out if asked.all else None,
                resume=asked.resume / str(index) if asked.resume else None, **options, **settings,
            )  # fmt: skip
            if others or asked.cross_check:
                problem = Problem(subject.model, subject.criterion, subject.batches, **options)
            for other, _ in others:
                end = Problem(other.model, other.criterion, other.batches, **options)
                folder = asked.resume / f"{index}-line" if asked.resume else None
                found = line_to(found, problem, end, other.name, folder)
            reports.append((subject.name, found))
            done.clear()
            if asked.cross_check:
                rows = side_by_side(found, cross_check(problem, seed=asked.seed))
                checks.append((subject.name, rows))
                print(
                    "\n".join(f"  {what:28} ours {ours:24} PyHessian {theirs}" for what, ours, theirs in rows)
                )
        finished = True
    except KeyboardInterrupt:
        if done:
            reports.append((subject.name, Report(tuple(done))))
        more = "" if asked.resume else "; with --resume DIR it could continue"
        print(f"interrupted: the measures printed above are complete{more}", file=sys.stderr)
    if finished or reports:
        _write(asked, reports, checks)
    return finished


def _left_out(name: str, mistake: ValueError) -> None:
    print(f"left out: {name}, as {mistake}", file=sys.stderr)


def _subjects(asked: SharpnessOptions, places: Sequence[str]) -> list[tuple[Any, dict[str, Any]]]:
    """Load the places, with their facts; first check that the output files can be written."""
    from conadv_lab.sharpness.measures.results import require_facts
    from conadv_lab.sharpness.measures.study import label_smoothing
    from conadv_lab.sharpness.subject import load

    given = {"learning_rate": asked.learning_rate, "augmentation": asked.augmentation}
    stated = {k: v for k, v in given.items() if v is not None} | pairs("--fact", asked.fact)
    found = []
    for place in places:
        subject = load(
            place, examples=asked.examples, batch_size=asked.batch_size, split=asked.split, trust=asked.trust
        )
        known = {"label_smoothing": label_smoothing(subject.criterion)} | dict(subject.facts)
        facts = known | _consistent(stated, known, subject.name)
        if asked.json or asked.html or asked.csv:
            require_facts(subject.name, facts)
        found.append((subject, facts))
    return found


def _consistent(stated: dict[str, Any], known: dict[str, Any], who: str) -> dict[str, Any]:
    """The stated facts that are not already known; contradicting a known one is an error."""
    from conadv_lab.mistakes import unknown
    from conadv_lab.sharpness.measures.results import FACTS

    for name, value in stated.items():
        if name not in FACTS:
            raise unknown("fact", name, FACTS)
        if known.get(name) not in (None, "unknown", value) and value != "unknown":
            raise ValueError(
                f"fact {name} is {value!r}; allowed: {known[name]!r}, which {who} already states"
            )
    return {name: value for name, value in stated.items() if known.get(name) in (None, "unknown")}


def _write(asked: SharpnessOptions, reports: Any, checks: Any) -> None:
    from conadv_lab import pages
    from conadv_lab.sharpness.report import figures, page

    made = page.page(reports, checks) if asked.html else ""  # before writing anything, as it may raise
    if asked.json:
        page.write_json(reports, asked.json, cross_check=[{"subject": n, "rows": r} for n, r in checks])
    if asked.html:
        pages.write(asked.html, made)
    if asked.csv:
        page.write_csv(reports, asked.csv)
    if asked.figures:
        for name, _, figure in figures.pictures(reports):
            pages.save(figure, asked.figures, name)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _print(measure: Any) -> None:
    for part, value, error in measure.parts():
        margin = "" if error is None else f" ± {error:.1g}"
        print(f"  {measure.name:36}{'' if part is None else part:>8}  {value:.6g}{margin}", flush=True)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
