"""A run is a folder: this module writes and reads it.

``config.json``: the resolved config · ``manifest.json``: provenance · ``metrics.jsonl``: one line per logged step ·
``checkpoints/step_00000123/`` with ``COMMIT.json`` · ``result.json``: once the run is finished.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab import checkpoints, displays
from conadv_lab.config import Config
from conadv_lab.files import write_json

if TYPE_CHECKING:
    import pandas as pd


class RunFolder:
    """The files of one run below ``path``; nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _repr_html_(self) -> str:
        if not (self.path / "config.json").is_file():
            return displays.table(("run folder", ""), [(str(self.path), "does not exist yet")])
        config, result, logged = self.config(), self.result(), self.metrics()
        at = logged[-1]["step"] + 1 if logged else 0
        rows = [
            (
                "state",
                f"finished after {result['steps']:,} steps"
                if result
                else f"unfinished, logged up to step {at:,}",
            ),
            ("method", config.method.method),
            ("global batch (images)", config.training.global_batch),
            ("seed", config.training.seed),
        ]
        shown = {
            "test_accuracy": "test accuracy (%)",
            "train_test_gap": "train − test accuracy (points)",
            "seconds": "seconds",
        }
        rows += [(label, result[name]) for name, label in shown.items() if result and name in result]
        return displays.table(("run folder", str(self.path)), rows)

    def to_frame(self) -> "pd.DataFrame":
        """The metrics, one row per logged step; `collect` gives one row per run."""
        import pandas as pd

        return pd.DataFrame(self.metrics())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, config: Config, manifest: dict[str, Any]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "manifest.json", manifest)
        write_json(self.path / "config.json", config.to_dict())

    def note_config(self, config: Config) -> None:
        """Record the config that a run is resumed with, if it differs from the original one."""
        if config != self.config():
            write_json(self.path / "config.json", config.to_dict())

    def clear_leftovers(self) -> None:
        """Remove checkpoints that were left half-written by a kill."""
        for leftover in self.checkpoints.glob(".partial-*"):
            shutil.rmtree(leftover)

    def config(self) -> Config:
        return Config.from_dict(self._json("config.json"))

    def manifest(self) -> dict[str, Any]:
        return self._json("manifest.json")

    def result(self) -> dict[str, Any] | None:
        """Final metrics, or None while the run is unfinished."""
        return self._json("result.json") if (self.path / "result.json").exists() else None

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines; a last line cut short by a kill is skipped."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def committed(self) -> list[Path]:
        """Committed checkpoints, newest first."""
        return checkpoints.committed(self.checkpoints)

    def save_checkpoint(self, step: int, state: dict[str, Any], metrics_bytes: int | None = None) -> Path:
        """Write a checkpoint to a temporary folder, sync it, hash it in its commit file, and only then rename it.

        Args:
            step: number of completed steps.
            state: tensors and plain values.
            metrics_bytes: length of metrics.jsonl at that step; None: its current length.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are intact.
        """
        self._sync_metrics()
        size = self.metrics_size() if metrics_bytes is None else metrics_bytes
        return checkpoints.save(self.checkpoints, step, state, size)

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(commit, state) of the latest intact checkpoint, or None; damaged ones are skipped with a warning."""
        for folder in self.committed():
            try:
                return checkpoints.read_checkpoint(folder)
            except ValueError as error:
                warnings.warn(f"{error}; trying the previous one", stacklevel=2)
        return None

    def metrics_size(self) -> int:
        """Size of metrics.jsonl in bytes."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def _sync_metrics(self) -> None:
        """Flush metrics.jsonl to disk: a commit must not count lines that a power loss could remove."""
        if self.metrics_file.exists():
            with self.metrics_file.open("ab") as file:
                os.fsync(file.fileno())

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, size: int) -> None:
        """Drop lines logged after the checkpoint that a run resumes from, so that no step appears twice."""
        if self.metrics_file.exists():
            os.truncate(self.metrics_file, min(size, self.metrics_file.stat().st_size))

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{self.path} is not a run folder: it has no {name}")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
