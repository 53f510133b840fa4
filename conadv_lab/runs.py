"""A run is a folder: this module writes it, reads it and gathers many into a table.

``config.json`` the resolved config · ``manifest.json`` where it came from · ``metrics.jsonl`` one line a logged
step · ``checkpoints/step_00000123/`` with ``COMMIT.json`` · ``result.json`` once it is finished.
"""

import glob
import json
import os
import pickle
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from difflib import get_close_matches
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from conadv_lab import displays, provenance
from conadv_lab.config import Config

if TYPE_CHECKING:
    import pandas as pd

KEPT_CHECKPOINTS = 2
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "conadv-lab")


class RunFolder:
    """The files of one run below ``path``; nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _repr_html_(self) -> str:
        if not (self.path / "config.json").is_file():
            return displays.table(("run folder", ""), [(str(self.path), "not there yet")])
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
        """The logged lines, one row a logged step; `collect` gives one row a run."""
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
        """Record what a run is continued with, where that is no longer what it was started with."""
        if config != self.config():
            write_json(self.path / "config.json", config.to_dict())

    def clear_leftovers(self) -> None:
        """Remove checkpoints that a kill left half-written."""
        for leftover in self.checkpoints.glob(".partial-*"):
            shutil.rmtree(leftover)

    def config(self) -> Config:
        return Config.from_dict(self._json("config.json"))

    def manifest(self) -> dict[str, Any]:
        return self._json("manifest.json")

    def result(self) -> dict[str, Any] | None:
        """Final figures, or None while the run is not finished."""
        return self._json("result.json") if (self.path / "result.json").exists() else None

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines; a last line that a kill cut short is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def committed(self) -> list[Path]:
        """Committed checkpoints, the newest first."""
        return sorted((commit.parent for commit in self.checkpoints.glob("step_*/COMMIT.json")), reverse=True)

    def save_checkpoint(self, step: int, state: dict[str, Any], metrics_bytes: int | None = None) -> Path:
        """Write a checkpoint beside, sync it, hash it in its commit file, and only then give it its name.

        Args:
            step: how many steps the state has behind it.
            state: tensors and plain values.
            metrics_bytes: how long metrics.jsonl was then; None is how long it is now.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are as they were.
        """
        final = self.checkpoints / f"step_{step:08d}"
        partial = self.checkpoints / f".partial-{step:08d}-{os.getpid()}"
        self._sync_metrics()
        size = self.metrics_size() if metrics_bytes is None else metrics_bytes
        try:
            partial.mkdir(parents=True)
            files = {"state.pt": write_hashed(partial / "state.pt", state)}
            commit = {"step": step, "metrics_bytes": size, "files": files}
            write_synced(partial / "COMMIT.json", json.dumps(commit, indent=1).encode())
            sync_folder(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder(self.checkpoints)
        except KeyboardInterrupt:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = [folder.name for folder in self.committed()]
            raise OSError(
                error.errno,
                f"the checkpoint of step {step} could not be saved in {self.checkpoints} ({error.strerror}); "
                f"intact: {', '.join(kept) or 'none'}. Make room and continue with --resume",
            ) from error
        # Newer ones can only be damaged ones that this run was continued before; they do not count.
        older = [folder for folder in self.committed() if folder.name < final.name]
        for old in older[KEPT_CHECKPOINTS - 1 :]:
            shutil.rmtree(old)
        return final

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(commit, state) of the newest intact checkpoint, or None; a damaged one is skipped with a warning."""
        for folder in self.committed():
            try:
                return read_checkpoint(folder)
            except ValueError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
        return None

    def metrics_size(self) -> int:
        """How many bytes metrics.jsonl has."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def _sync_metrics(self) -> None:
        """Put metrics.jsonl on the disk: a commit must not remember lines that a power loss takes."""
        if self.metrics_file.exists():
            with self.metrics_file.open("ab") as file:
                os.fsync(file.fileno())

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, size: int) -> None:
        """Drop what was logged after the checkpoint that a run continues from, so that no step stands twice."""
        if self.metrics_file.exists():
            os.truncate(self.metrics_file, min(size, self.metrics_file.stat().st_size))

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{self.path} is no run folder: it has no {name}")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(commit, state) of one checkpoint folder, its hash checked, unpickling tensors and plain values only.

    Raises:
        ValueError: a file is missing, cut short or altered.
    """
    import torch

    commit_file = folder / "COMMIT.json"
    if not commit_file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no COMMIT.json")
    try:
        commit = json.loads(commit_file.read_text())
        wanted = commit["files"]["state.pt"]
        with (folder / "state.pt").open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {type(error).__name__}: {error}") from error
    if found != wanted:
        raise ValueError(f"checkpoint {folder} is damaged: state.pt does not match the hash in COMMIT.json")
    try:
        return commit, torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {folder} holds more than tensors and plain values; it was not loaded"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(beside, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        beside.replace(path)
    except (OSError, KeyboardInterrupt):
        beside.unlink(missing_ok=True)
        raise


class _Hashed:
    """A file that torch writes from front to back, and the hash of what it wrote.

    An error is kept for later: torch would make another one of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, sha256()
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        if self.error is None:
            self.hash.update(content)
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        pass


def write_hashed(path: Path, state: dict[str, Any]) -> str:
    """Save a state and give the file's SHA-256, without a second copy of the state in memory."""
    import torch

    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(state, hashed)  # type: ignore[arg-type]
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
    return hashed.hash.hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest(fingerprints: dict[str, str]) -> dict[str, Any]:
    """When, from which code, with which packages and on which machine a run was started."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **provenance.source(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "slurm": provenance.slurm_variables(),
        **fingerprints,
    }


def collect(pattern: str | Path | list[str | Path]) -> "pd.DataFrame":
    """One row a run: its config's fields, its final figures, its state; for ``"runs/*"`` or a list of folders.

    Folders that are no runs are passed over, with a warning where no other is left. A run that is not finished has no
    figures, and state ``unfinished``.

    Raises:
        ValueError: nothing is there by that name.
    """
    patterns = [str(item) for item in (pattern if isinstance(pattern, list) else [pattern])]
    paths = {match for item in patterns for match in _matches(item)}
    if not paths:
        near = next((hint for item in patterns if (hint := _near(item))), None)
        hint = f" Did you mean {near!r}?" if near else ""
        told = ", ".join(map(repr, patterns)) or "an empty list"
        raise ValueError(f"nothing matches {told} in {Path.cwd()}; allowed: run folders, as 'runs/*'.{hint}")
    frame = frame_of(paths)
    if frame.empty:
        warnings.warn(
            f"{', '.join(map(repr, patterns))}: no run among the {len(paths)} matches", stacklevel=2
        )
    return frame


def frame_of(paths: Iterable[str]) -> "pd.DataFrame":
    """As `collect`, of the runs among these folders."""
    import pandas as pd

    rows = []
    for path in sorted(paths):
        if not (Path(path) / "config.json").is_file():
            continue
        folder = RunFolder(path)
        result = folder.result()
        row: dict[str, Any] = {"run": path, "state": "unfinished" if result is None else "done"}
        for section in folder.config().to_dict().values():
            row |= section
        rows.append(row | (result or {}))
    return pd.DataFrame(rows)


def _near(pattern: str) -> str | None:
    """The pattern with its first part that is not there replaced by the nearest one that is."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.glob(str(Path(*parts[: number + 1]))):
            continue
        there = [path.name for path in Path(*parts[:number]).glob("*") if path.is_dir()]
        near = get_close_matches(part, there, n=1, cutoff=0.5)
        return str(Path(*parts[:number], near[0], *parts[number + 1 :])) if near else None
    return None


def _matches(pattern: str) -> list[str]:
    """Folders by a pattern, or the one that is named so."""
    return [pattern] if Path(pattern).is_dir() else glob.glob(pattern, recursive=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except Exception:
        return None
