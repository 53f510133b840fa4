"""The linter, the formatter, the type checker and the spell checker are part of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import rest_slow

ROOT = Path(__file__).parents[1]
CHECKS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "spelling": ["codespell_lib"],
}


@pytest.mark.parametrize("name", rest_slow(CHECKS, "lint", "format", "spelling"))
def test_style(name):
    run = subprocess.run(
        [sys.executable, "-m", *CHECKS[name]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
