"""The staleness τ of every step and worker as one integer array: constant, random, or read from a trace."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from conadv_lab.mistakes import require, unknown
from conadv_lab.seeds import derived_seed

Taus = NDArray[np.int64]
KINDS = ("constant", "geometric", "poisson", "per-worker", "trace")


@dataclass(frozen=True)
class Draw:
    """The source of τ.

    Args:
        kind: ``"constant"`` · ``"geometric"``, P(τ = k) = p(1 − p)^k with mean (1 − p)/p · ``"poisson"`` ·
            ``"per-worker"``, a constant per worker · ``"trace"``, output of a timeline.
        tau: the constant, or the mean of the distribution.
        workers: how many workers share a global batch, each with its own τ.
        of_workers: per-worker only: each worker's τ.
        trace: trace only: (steps, workers) whole numbers of at least 0.

    Raises:
        ValueError: an unknown kind, a negative or broken number, a trace with gaps.

    >>> Draw("per-worker", of_workers=(0, 3)).array(steps=2, seed=0).tolist()
    [[0, 3], [0, 3]]
    """

    kind: str = "constant"
    tau: float = 1
    workers: int = 1
    of_workers: tuple[float, ...] = ()
    trace: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("draw", self.kind, KINDS)
        require(self.workers >= 1, "workers", self.workers, "a whole number of at least 1")
        if self.kind == "per-worker":
            fine = bool(self.of_workers) and all(_whole(tau) for tau in self.of_workers)
            require(fine, "the workers' taus", self.of_workers, "whole numbers of at least 0, one per worker")
        elif self.kind == "trace":
            object.__setattr__(self, "trace", checked(self.trace))
        elif self.kind == "constant":
            require(_whole(self.tau), "tau", self.tau, "a whole number of at least 0")
        else:
            require(0 <= self.tau < float("inf"), "tau", self.tau, "a number of at least 0, the mean")

    @property
    def columns(self) -> int:
        """Number of workers in the array."""
        if self.kind == "trace":
            return self.trace.shape[1]
        return len(self.of_workers) if self.kind == "per-worker" else self.workers

    @property
    def mean(self) -> float:
        """The requested mean τ; at step t the effective τ is at most t."""
        if self.kind == "trace":
            return float(self.trace.mean())
        return float(np.mean(self.of_workers)) if self.kind == "per-worker" else float(self.tau)

    def array(self, steps: int, seed: int) -> Taus:
        """(steps, workers) of τ, reproducible from the seed; a longer trace is truncated.

        Raises:
            ValueError: the trace has fewer steps.
        """
        shape = (steps, self.columns)
        generator = np.random.default_rng(derived_seed(seed, "staleness", self.kind))
        if self.kind == "trace":
            require(len(self.trace) >= steps, "the trace's number of steps", len(self.trace),
                    f"at least {steps}, the steps of the run")  # fmt: skip
            return self.trace[:steps]
        if self.kind == "per-worker":
            return np.tile(np.array(self.of_workers, dtype=np.int64), (steps, 1))
        if self.kind == "geometric":
            return generator.geometric(1 / (1 + self.tau), shape) - 1
        if self.kind == "poisson":
            return generator.poisson(self.tau, shape)
        return np.full(shape, int(self.tau), dtype=np.int64)


def checked(taus: Any) -> Taus:
    """An array of τ as (steps, workers) int64; (steps,) means one worker.

    Raises:
        ValueError: gaps (NaN), negative numbers, fractions, or another shape.

    >>> checked([[0, 1], [float("nan"), 1]])
    Traceback (most recent call last):
    ValueError: the trace has no number at step 1, worker 0; allowed: whole numbers of at least 0, without gaps
    """
    try:
        values = np.asarray(taus, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            "the trace is not an array of numbers; allowed: (steps, workers) of whole numbers"
        ) from None
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"the trace has shape {values.shape}; allowed: (steps, workers), neither of them 0")
    allowed = "whole numbers of at least 0, without gaps"
    for wrong, told in (
        (~np.isfinite(values), "no number"),
        (values < 0, "a negative number"),
        (values != np.floor(values), "a fraction"),
        (values > 2**53, "a number beyond 2^53"),
    ):
        if wrong.any():
            step, worker = (int(place) for place in np.argwhere(wrong)[0])
            raise ValueError(f"the trace has {told} at step {step}, worker {worker}; allowed: {allowed}")
    return values.astype(np.int64)


def read_trace(path: str | Path) -> Taus:
    """A trace from a file: ``.npy`` of (steps, workers), or ``.csv`` with one line per step and one column per worker.

    The first line of a CSV may name the columns; a column ``step`` must number the lines from 0.

    Raises:
        ValueError: no such file, an unsupported format, gaps, negative numbers, fractions.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"{place} is not a file; allowed: a trace as .csv or .npy")
    if place.suffix == ".npy":
        try:
            return checked(np.load(place, allow_pickle=False))
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error
    if place.suffix != ".csv":
        raise ValueError(f"{place} ends in {place.suffix!r}; allowed: a trace as .csv or .npy")
    try:
        return checked(_columns(place.read_text().splitlines()))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _columns(lines: list[str]) -> list[list[float]]:
    """The workers' columns of a CSV; anything that is not a number is a gap."""
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    names = rows.pop(0) if rows and not any(_is_number(cell) for cell in rows[0]) else []
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"the trace has {len(row)} columns at step {number}; allowed: {len(rows[0])}, as at step 0"
            )
    values = [[float(cell) if _is_number(cell) else float("nan") for cell in row] for row in rows]
    if "step" in names and rows:
        place = names.index("step")
        for number, counted in enumerate(values):
            if counted.pop(place) != number:
                raise ValueError(f"the trace lacks step {number}; allowed: every step from 0, in order")
    return values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _whole(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= cast(float, value) < 2**53 and value == int(value)
