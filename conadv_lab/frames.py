"""Many runs as one DataFrame."""

import glob
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab.runs import RunFolder

if TYPE_CHECKING:
    import pandas as pd


def collect(pattern: str | Path | list[str | Path]) -> "pd.DataFrame":
    """One row per run: its config, final metrics and state; for a pattern such as ``"runs/*"`` or a list of folders.

    Folders that are not runs are skipped, with a warning if none is left. An unfinished run has no metrics and state
    ``unfinished``.

    Raises:
        ValueError: nothing matches.
    """
    patterns = [str(item) for item in (pattern if isinstance(pattern, list) else [pattern])]
    paths = {match for item in patterns for match in _matches(item)}
    if not paths:
        near = next((hint for item in patterns if (hint := _near(item))), None)
        hint = f" Did you mean {near!r}?" if near else ""
        told = ", ".join(map(repr, patterns)) or "an empty list"
        raise ValueError(
            f"nothing matches {told} in {Path.cwd()}; allowed: run folders, such as 'runs/*'.{hint}"
        )
    frame = frame_of(paths)
    if frame.empty:
        warnings.warn(
            f"{', '.join(map(repr, patterns))}: no run among the {len(paths)} matches", stacklevel=2
        )
    return frame


def frame_of(paths: Iterable[str]) -> "pd.DataFrame":
    """Like `collect`, for the runs among these folders."""
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
    """The pattern, with its first missing part replaced by the nearest existing name."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.glob(str(Path(*parts[: number + 1]))):
            continue
        there = [path.name for path in Path(*parts[:number]).glob("*") if path.is_dir()]
        near = get_close_matches(part, there, n=1, cutoff=0.5)
        return str(Path(*parts[:number], near[0], *parts[number + 1 :])) if near else None
    return None


def _matches(pattern: str) -> list[str]:
    """Folders that match a pattern, or the one with exactly this name."""
    return [pattern] if Path(pattern).is_dir() else glob.glob(pattern, recursive=True)


def frame_of_metrics(runs: Mapping[str, Any]) -> "pd.DataFrame":
    """The metrics of several run folders (`conadv_lab.runs.RunFolder`), with their names in a column ``run``."""
    import pandas as pd

    return pd.concat([pd.DataFrame(folder.metrics()).assign(run=name) for name, folder in runs.items()])
