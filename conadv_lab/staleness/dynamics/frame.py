"""The tidy frame of the dynamics: its columns, and how it is printed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "problem", "draw", "tau", "workers", "seed", "lr", "step", "phase", "worker", "effective_tau", "tau_lr",
    "measure", "value",
)  # fmt: skip
PHASES = ("warm-up", "early", "late")
WHOLE = "whole"
"""Phase of values of a whole run instead of a step."""


def tidy(rows: Iterable[dict[str, Any]]) -> "pd.DataFrame":
    """A frame with one row per value.

    Columns: ``problem``, ``draw``, ``tau`` (constant or mean), ``workers``, ``seed``, ``lr`` (peak), ``step``,
    ``phase`` (``"warm-up"``, the ``"early"`` or ``"late"`` half after it, or ``"whole"``), ``worker`` (NaN for a
    run), ``effective_tau`` (for a run its mean), ``tau_lr`` (sum of the learning rates of the steps in between; for a
    run its mean), ``measure``, ``value``.
    """
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def print_table(frame: "pd.DataFrame") -> None:
    """One line per distribution of τ, with means over seeds; then stale versus fresh attacks by phase."""
    import pandas as pd

    keys = ["problem", "draw", "tau", "workers"]
    whole, probes = frame[frame["phase"] == WHOLE], frame[frame["phase"] != WHOLE]
    by_draw = whole.groupby(keys, sort=False)
    runs = whole.pivot_table("value", keys, "measure", sort=False)
    runs.insert(0, "seeds", by_draw["seed"].nunique())
    runs.insert(1, "effective_tau", by_draw["effective_tau"].mean())
    with pd.option_context("display.width", 160, "display.max_columns", 30, "display.max_rows", 200):
        print(_told(runs))
        if len(probes):
            print("\nstale versus fresh attacks, means over probes, workers and seeds")
            phases = [*keys[1:3], "phase"]
            compared = probes.pivot_table("value", phases, "measure", sort=False)
            compared.insert(0, "effective_tau", probes.groupby(phases, sort=False)["effective_tau"].mean())
            print(_told(compared))


def _told(table: "pd.DataFrame") -> str:
    return table.reset_index().to_string(index=False, float_format=lambda value: f"{value:.4g}")
