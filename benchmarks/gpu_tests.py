"""The tests that only a CUDA device can run: ``python -m benchmarks.gpu_tests [--json FILE] [--files FILE …]``.

Only files with such tests are collected, so packages that other tests need may be missing. Counts are written after
each test. The exit status is pytest's.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness import Row, publish, write
from conadv_lab import cli

ROOT = Path(__file__).resolve().parents[1]
MARK = "mark.gpu"


class Counts:
    """A pytest plugin that counts outcomes and writes them to disk as they come."""

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
    """Test files with at least one test marked for a GPU."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]


@dataclass(frozen=True)
class GpuTestsOptions:
    json: Path | None = None  # Write the counts to this file too.
    files: tuple[Path, ...] = ()  # These alone.


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = cli.asked(GpuTestsOptions, words, "benchmarks.gpu_tests", __doc__)
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
