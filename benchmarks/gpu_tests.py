"""The tests that only a CUDA device can run: ``python -m benchmarks.gpu_tests [--json FILE] [--files FILE …]``.

Only files that have such a test are collected, so that packages which other tests need may be missing. Counts are
written after each test. Exit status: pytest's.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.harness import Row, publish, write

ROOT = Path(__file__).resolve().parents[1]
MARK = "mark.gpu"


class Counts:
    """A pytest plugin that counts outcomes, and keeps them on the disk as they come."""

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.outcomes: Counter[str] = Counter(passed=0, failed=0, skipped=0)
        self.failed: list[str] = []

    def rows(self) -> list[Row]:
        counted = [Row(name, count, "tests") for name, count in self.outcomes.items()]
        return counted + [Row(f"failed: {name}", 1, "test") for name in self.failed]

    def note(self, outcome: str, name: str) -> None:
        self.outcomes[outcome] += 1
        if outcome == "failed":
            self.failed.append(name)
        if self.json_file is not None:
            write(self.rows(), self.json_file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a fixture may skip or fail, too
            self.note(report.outcome, report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note("failed", report.nodeid)


def files() -> list[Path]:
    """Test files with a test that is marked for a GPU."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]


def main(words: Iterable[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file too")
    parser.add_argument("--files", type=Path, nargs="+", metavar="FILE", help="these alone")
    asked = parser.parse_args(None if words is None else list(words))
    os.environ["CONADV_TEST_GPU"] = "1"
    counts = Counts(asked.json)
    options = [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--rootdir",
        str(ROOT),
    ]
    status = pytest.main([*options, *map(str, asked.files or files())], plugins=[counts])
    publish(counts.rows(), asked.json)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
