"""Results of GPU visits as Markdown: a page of their own, and docs/gpu.md.

    python -m benchmarks.gpu_page [--check]

writes the committed visits, analysis/results/gpu/*.json, between two markers in docs/gpu.md, newest first. ``--check``
changes nothing and fails if the page is out of date.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import in_words
from conadv_lab import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, VISITS = ROOT / "docs/gpu.md", ROOT / "analysis/results/gpu"
MARKED = re.compile(r"<!-- visits -->.*<!-- end -->", re.DOTALL)
LINES = 60
"""Lines shown from the end of a part's output; all of it is in gpu.json."""
ERROR_LINES = 20


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The page, from the records of what each part measured and printed."""
    return "\n\n".join(["# A GPU visit", *blocks_of(records, "##")]) + "\n"


def refreshed(text: str, visits: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A document with these visits between its markers, newest first."""
    blocks = []
    for records in sorted(visits, key=_day, reverse=True):
        gpus = {record["machine"].get("gpu", "no GPU") for record in records if "machine" in record}
        blocks += [f"### {_day(records)}, {' and '.join(sorted(gpus))}", *blocks_of(records, "####")]
    inside = "\n\n".join(["<!-- visits -->", *blocks, "<!-- end -->"])
    return MARKED.sub(lambda _: inside, text)


def blocks_of(records: Sequence[Mapping[str, Any]], heading: str) -> list[str]:
    """A visit as blocks of Markdown; its parts get headings of this level."""
    blocks = [*_machines(records), _overview(records)]
    for record in records:
        if record["status"] != "not run":
            blocks += section(record, heading)
    return blocks


def section(record: Mapping[str, Any], heading: str) -> list[str]:
    """One part, as blocks of Markdown."""
    seconds = f" after {record['seconds']:.0f} s" if "seconds" in record else ", cut off"
    reason = f" ({record['reason']})" if "reason" in record else ""
    small = ", at tiny size, so its figures mean nothing" if record["small"] else ""
    blocks = [
        f"{heading} {record['part']}",
        f"{record['about'][0].upper()}{record['about'][1:]}: {record['status']}{reason}{seconds}{small}.",
        _fenced(record["command"]),
    ]
    rows = (record.get("figures") or {}).get("rows")
    if rows and record["shown"] == "rows":
        blocks.append(_table(rows))
    elif record.get("output", "").strip():
        blocks.append(_fenced(_tail(record["output"], LINES)))
    if record["status"] != "finished" and record.get("errors", "").strip():
        blocks.append(_fenced(_tail(record["errors"], ERROR_LINES)))
    return blocks


@dataclass(frozen=True)
class PageOptions:
    check: bool = False  # Change nothing; fail if the page is stale.


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = cli.asked(PageOptions, words, "benchmarks.gpu_page", __doc__)
    visits = [json.loads(file.read_text())["parts"] for file in sorted(VISITS.glob("*.json"))]
    before = DOCUMENT.read_text(encoding="utf-8")
    after = refreshed(before, visits)
    if after == before:
        return 0
    print(f"{DOCUMENT} {'is stale' if asked.check else 'was brought up to date'}")
    if not asked.check:
        DOCUMENT.write_text(after, encoding="utf-8")
    return int(asked.check)


def _day(records: Sequence[Mapping[str, Any]]) -> str:
    return max((record["when"][:10] for record in records if "when" in record), default="")


def _machines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where and when; parts of one folder may come from several machines."""
    parts: dict[str, list[str]] = {}
    for record in records:
        if "machine" in record:
            day, commit = record["when"][:10], record["commit"] or "unknown"
            where = f"{in_words(record['machine'])} · {day} · commit {commit[:7]}"
            parts.setdefault(where, []).append(record["part"])
    if len(parts) == 1:
        return [next(iter(parts))]
    return [f"{where} (parts {', '.join(names)})" for where, names in parts.items()]


def _overview(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| part | what | how it ended | seconds |", "|---|---|---|---|"]
    for record in records:
        reason = f": {record['reason']}" if "reason" in record else ""
        seconds = f"{record['seconds']:.0f}" if "seconds" in record else "–"
        lines.append(f"| {record['part']} | {record['about']} | {record['status']}{reason} | {seconds} |")
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| what | figure | | beside |", "|---|---|---|---|"]
    for row in rows:
        beside = "" if row["ratio"] is None else f"{row['ratio']:.3f} × {row['peer']}"
        lines.append(f"| {row['name']} | {row['value']:.4g} | {row['unit']} | {beside} |")
    return "\n".join(lines)


def _tail(text: str, lines: int) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    sys.exit(main())
