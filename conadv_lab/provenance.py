"""A run's provenance: its code, packages and machine."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
SNAPSHOT = "SNAPSHOT.json"
LARGEST_DIFF = 1_000_000
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "conadv-lab")


def source() -> dict[str, Any]:
    """``commit`` (with ``+`` if the tree differs) and ``diff`` of the package's checkout; each None without git.

    Code that submit copied beside a run has no git; both were recorded when it was copied.
    """
    known = PACKAGE.parent / SNAPSHOT
    if known.is_file():
        about = json.loads(known.read_text())
        return {"commit": about["commit"], "diff": about["diff"]}
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", str(PACKAGE))
        diff = _git("diff", "HEAD", "--", str(PACKAGE)) if changed else ""
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {"commit": None, "diff": None}
    kept = diff if len(diff) <= LARGEST_DIFF else f"left out: {len(diff)} characters"
    return {"commit": commit + ("+" if changed else ""), "diff": kept}


def slurm_variables() -> dict[str, str]:
    """This process's SLURM variables, without the access token; empty outside SLURM."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("SLURM_") and name != "SLURM_JWT"
    }


def _git(*words: str) -> str:
    command = ["git", "-C", str(PACKAGE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def manifest(fingerprints: dict[str, str]) -> dict[str, Any]:
    """When, with which code and packages, and on which machine a run was started."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **source(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "slurm": slurm_variables(),
        **fingerprints,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except Exception:
        return None
