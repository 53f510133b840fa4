"""Keep the documents' figures up to date with the tables: python -m analysis.texts [--check]

A number from a study stands between two comments in a document, and is written from the study's table:

    <!-- study accuracy_vs_batch:conadv_vanilla -->+0.75 (+0.51 to +0.99)<!-- end -->

``NAME:conclusion`` is the study's conclusion, ``NAME:hardware`` where and when it was measured; all other names are
keys of the study's ``numbers``. ``<!-- methods:table -->`` holds the table of methods. ``--check`` changes
nothing and fails if a document is out of date.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.study import RESULTS, studies, table
from conadv_lab.cli import asked
from conadv_lab.config import methods_table
from conadv_lab.mistakes import unknown

DOCUMENTS = (
    "README.md",
    *(f"docs/{name}.md" for name in ("method", "results", "index", "faq", "stale", "measure")),
)
MARKED = re.compile(r"<!-- ((?:study )?(\w+):(\w+)) -->(.*?)<!-- end -->", re.DOTALL)


def refreshed(text: str, known: Callable[[str], dict[str, Any]]) -> str:
    """The text with every marked part filled from the tables.

    >>> refreshed("<!-- study a:b -->0.1<!-- end --> points", lambda name: {"b": 0.25})
    '<!-- study a:b -->0.25<!-- end --> points'
    """

    def replaced(found: re.Match) -> str:
        mark, study, name, _ = found.groups()
        numbers = known(study)
        if name not in numbers:
            raise unknown(f"number of study {study}", name, numbers)
        new = str(numbers[name])
        new = f"\n\n{new}\n\n" if "\n" in new else new  # a separate paragraph or table
        return f"<!-- {mark} -->{new}<!-- end -->"

    return MARKED.sub(replaced, text)


def numbers_of(study: str, results: Path = RESULTS) -> dict[str, Any]:
    """A study's numbers, its conclusion, and where it was measured."""
    if study == "methods":
        return {"table": methods_table()}
    own = studies()
    if study not in own:
        raise unknown("study", study, own)
    rows = table(study, results)
    manifest = json.loads((results / f"{study}.json").read_text())
    hardware = (
        f"{manifest['machine']['cpu']}, one thread, torch {manifest['machine']['torch']}, {manifest['date']}, "
        f"commit {', '.join(one[:7] for one in str(manifest['commit']).split(', '))}"
    )
    return {**own[study].numbers(rows), "conclusion": own[study].told(rows), "hardware": hardware}


@dataclass(frozen=True)
class Options:
    check: bool = False
    """Change nothing; fail if a document is stale."""


def main(arguments: list[str] | None = None) -> int:
    given = asked(Options, arguments, "python -m analysis.texts", __doc__)
    cache: dict[str, dict[str, Any]] = {}

    def known(study: str) -> dict[str, Any]:
        if study not in cache:
            cache[study] = numbers_of(study)
        return cache[study]

    stale = False
    for document in map(Path, DOCUMENTS):
        before = document.read_text(encoding="utf-8")
        after = refreshed(before, known)
        if after != before:
            stale = True
            print(f"{document} {'is stale' if given.check else 'was brought up to date'}")
            if not given.check:
                document.write_text(after, encoding="utf-8")
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
