"""The command: ``python -m conadv_lab.staleness theory``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from conadv_lab.cli import OUTPUT_FILES, parsed
from conadv_lab.mistakes import require
from conadv_lab.outputs import Outputs
from conadv_lab.staleness.theory.compare import compare, figure_of_bound
from conadv_lab.staleness.theory.quadratic import Quadratic, example

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SIGN_STEP = """One sign step is not an approximate maximiser: if the maximiser is inside the ball, the sign step is
on its boundary. All we can say is ‖δ̂ − δ*‖² ≤ dε², which also holds for not attacking at all, so the bound has a
floor that neither a smaller step size nor a longer run lowers. A network's loss is not even concave in the
image. The theorem does not cover practice."""


@dataclass(frozen=True)
class TheoryOptions:
    """Compare the bound with measurements on a quadratic problem."""

    taus: tuple[int, ...] = tuple(range(17))
    """Staleness."""
    lrs: tuple[float, ...] = ()
    """Step sizes; none: three, see the docs."""
    steps: int = 3000
    """Steps per run."""
    replicas: int = 64
    """Number of runs to average."""
    solver: str = "exact"
    """Inner solver: exact, ascent or sign."""
    size: int = 8
    """Dimension of θ and of x."""
    noise: float = 0.3
    """Standard deviation s of the examples."""
    batch: int = 1
    """Examples per step."""
    seed: int = 0
    """Seed of problem and noise."""
    files: Annotated[Outputs, OUTPUT_FILES] = field(default_factory=Outputs)


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    try:
        asked = parsed(TheoryOptions, words, "conadv_lab.staleness theory")
        asked.files.require_writable()
        require(asked.size >= 1, "size", asked.size, "a whole number of at least 1")
        problem = example(asked.size, asked.noise, seed=asked.seed, batch=asked.batch)
        rows = evaluate(problem, asked)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    print_table(rows, asked.solver)
    asked.files.write(rows)
    asked.files.write_figure(lambda: _picture(rows[rows["solver"] == asked.solver]))
    return 0


def evaluate(problem: Quadratic, asked: TheoryOptions) -> "pd.DataFrame":
    """The requested rows, plus one sign step at the smallest and the largest τ."""
    import pandas as pd

    start = np.full(len(problem.a), 0.5)
    taus = sorted(set(asked.taus))
    options: dict[str, Any] = {"steps": asked.steps, "replicas": asked.replicas, "seed": asked.seed}
    rows = compare(problem, start, taus, asked.lrs, solvers=(asked.solver,), **options)
    if asked.solver == "sign":
        return rows
    ends = sorted({taus[0], taus[-1]})
    return pd.concat([rows, compare(problem, start, ends, asked.lrs, solvers=("sign",), **options)])


def print_table(rows: "pd.DataFrame", solver: str) -> None:
    """Measured / bound for every τ and step size, then the sign step."""
    own = rows[rows["solver"] == solver]
    print(f"mean ‖∇F(θ)‖² over {own['steps'].iloc[0]} steps, measured / bound; inner solver: {solver}")
    _print_pairs(own)
    if own["bound"].isna().any():
        print("not covered: the step size is above 2 / (L_F + √(L_F² + 16κ²τ²)), so the bound says nothing")
    over = own[own["measured"] > own["bound"]]
    print(f"measured above the bound: {len(over)} of {int(own['bound'].notna().sum())}")
    if solver != "sign":
        print("\none sign step instead of the solver:")
        _print_pairs(rows[rows["solver"] == "sign"])
    print("\n" + SIGN_STEP)


def _print_pairs(rows: "pd.DataFrame") -> None:
    print(f"{'τ':>4}" + "".join(f"{f'η = {lr:.4g}':>24}" for lr in sorted(rows["lr"].unique())))
    for tau, own in rows.groupby("tau"):
        cells = []
        for measured, above in own.sort_values("lr")[["measured", "bound"]].to_numpy():
            told = "not covered" if np.isnan(above) else f"{above:.4g}"
            cells.append(f"{f'{measured:.4g} / {told}':>24}")
        print(f"{tau:>4}" + "".join(cells))


def _picture(rows: "pd.DataFrame") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    figure_of_bound(rows, ax=figure.add_subplot())
    return figure
