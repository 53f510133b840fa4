"""Atomic writes: a file is complete or absent, whatever stops the writer."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary file and rename it, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(beside, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        beside.replace(path)
    except (OSError, KeyboardInterrupt):
        beside.unlink(missing_ok=True)
        raise


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
