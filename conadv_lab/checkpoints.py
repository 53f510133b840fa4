"""Checkpoints of a run: written to a temporary folder, synced, hashed in a commit file, and only then renamed."""

import json
import os
import pickle
import shutil
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO

from conadv_lab.files import sync_folder, write_synced

KEPT_CHECKPOINTS = 2


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints in a run's checkpoint folder, newest first."""
    return sorted((commit.parent for commit in folder.glob("step_*/COMMIT.json")), reverse=True)


def save(folder: Path, step: int, state: dict[str, Any], metrics_bytes: int) -> Path:
    """Like `conadv_lab.runs.RunFolder.save_checkpoint`, in a run's checkpoint folder."""
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial-{step:08d}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        files = {"state.pt": write_hashed(partial / "state.pt", state)}
        commit = {"step": step, "metrics_bytes": metrics_bytes, "files": files}
        write_synced(partial / "COMMIT.json", json.dumps(commit, indent=1).encode())
        sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
    except KeyboardInterrupt:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [one.name for one in committed(folder)]
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be saved in {folder} ({error.strerror}); "
            f"intact: {', '.join(kept) or 'none'}. Free disk space and continue with --resume",
        ) from error
    # Newer checkpoints can only be damaged ones, which this run resumed from before; they do not count.
    older = [one for one in committed(folder) if one.name < final.name]
    for old in older[KEPT_CHECKPOINTS - 1 :]:
        shutil.rmtree(old)
    return final


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(commit, state) of one checkpoint folder, its hash checked, loading tensors and plain values only.

    Raises:
        ValueError: a file is missing, cut short or altered.
    """
    import torch

    commit_file = folder / "COMMIT.json"
    if not commit_file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no COMMIT.json")
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
            f"checkpoint {folder} contains more than tensors and plain values; it was not loaded"
        ) from error


class _Hashed:
    """Hashes a file while torch writes it sequentially.

    Keeps a write error, which torch would replace by another one.
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
    """Save a state and return the file's SHA-256, without a second copy of the state in memory."""
    import torch

    with path.open("wb") as file:
        hashed = _Hashed(file)
        torch.save(state, hashed)  # type: ignore[arg-type]
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
    return hashed.hash.hexdigest()
