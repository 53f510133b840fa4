"""What a GPU visit found, as one page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import in_words

LINES = 60
"""Of what a part printed, from the end; all of it is in gpu.json."""
ERROR_LINES = 20


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The page, from the parts' records with what they measured and printed."""
    blocks = ["# A GPU visit", *_machines(records), _overview(records)]
    for record in records:
        if record["status"] != "not run":
            blocks += section(record)
    return "\n\n".join(blocks) + "\n"


def section(record: Mapping[str, Any]) -> list[str]:
    """One part, as blocks of Markdown."""
    seconds = f" after {record['seconds']:.0f} s" if "seconds" in record else ", cut off"
    reason = f" ({record['reason']})" if "reason" in record else ""
    small = ", in small, so its figures mean nothing" if record["small"] else ""
    blocks = [
        f"## {record['part']}",
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


def _machines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where and when; parts of one folder may have been measured in several places."""
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
