"""Stores finished parts of long measurements in a folder, so that a second call resumes from there."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class Journal:
    """Finished parts by name, in one folder; without a folder nothing is stored.

    Each part is written to a temporary file and renamed, so an interrupted write keeps the previous version. A
    folder belongs to one measurement: ``key`` (weights, data, loss, facts, settings) is compared on opening.

    Raises:
        ValueError: the folder belongs to another measurement.
    """

    def __init__(
        self, folder: str | Path | None, key: dict[str, Any] | None = None, every: float = 30.0
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.every, self._last = every, time.monotonic()
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(key or {}, sort_keys=True, default=str)
        note = self.folder / "measurement.json"
        if note.exists() and note.read_text() != text:
            raise ValueError(
                f"{self.folder} belongs to another measurement (other weights, data, loss, facts or settings)"
            )
        note.write_text(text)

    def get(self, name: str) -> Any:
        """The part stored under this name, or ``None``."""
        if self.folder is None or not (self.folder / f"{name}.pt").exists():
            return None
        return torch.load(self.folder / f"{name}.pt", weights_only=True, map_location="cpu")

    def put(self, name: str, part: Any) -> None:
        """Store a part: tensors, numbers, strings, lists and dicts of them."""
        if self.folder is None:
            return
        temporary = self.folder / f"{name}.pt.partial"
        torch.save(part, temporary)
        os.replace(temporary, self.folder / f"{name}.pt")
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to store an unfinished part."""
        return self.folder is not None and time.monotonic() - self._last >= self.every
