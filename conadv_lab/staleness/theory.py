"""The bound of docs/theory.md beside what is measured on the quadratic problem."""

import argparse
import sys
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from conadv_lab.mistakes import require
from conadv_lab.staleness.bound import Constants, bound, bound_of_bounded_steps
from conadv_lab.staleness.outputs import Outputs, add_options
from conadv_lab.staleness.quadratic import Array, Quadratic, example, inner_gap, simulate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRACTIONS = (0.25, 0.5, 1.0)
"""Step sizes of the command, over the largest one that the bound covers at the largest τ."""
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#E69F00", "D"), ("#CC79A7", "v"))
SIGN_STEP = """One sign step is no approximate maximiser: where the maximiser lies inside the ball, the sign step
lies on its rim. All that can be said here is ‖δ̂ − δ*‖² ≤ dε², which leaving the image alone satisfies as
well, so its bound has a floor that neither a smaller step nor a longer run lowers. A network's loss is not
even concave in the image. The theorem does not cover what is done in practice."""


def constants_of(problem: Quadratic, start: Array, solver: str = "exact") -> Constants:
    """Every constant of the quadratic problem, in closed form."""
    coupling = float(np.linalg.norm(problem.b, 2))
    return Constants(
        theta_theta=float(np.linalg.norm(problem.a, 2)),
        theta_x=coupling,
        x_theta=coupling,
        mu=problem.mu,
        weights=problem.weights,
        variance=problem.variance,
        batch=problem.batch,
        excess=float(problem.objective(np.asarray(start))),
        gap=inner_gap(problem, solver),
    )


def compare(
    problem: Quadratic,
    start: Array,
    taus: Sequence[int] = tuple(range(17)),
    lrs: Sequence[float] = (),
    *,
    steps: int = 3000,
    replicas: int = 64,
    solvers: Sequence[str] = ("exact",),
    seed: int = 0,
) -> "pd.DataFrame":
    """Bound and measurement side by side, a row for every solver, step size and τ.

    Args:
        lrs: step sizes; none: ¼, ½ and all of the largest that is covered at the largest τ.

    Returns:
        Columns ``solver``, ``tau``, ``lr``, ``steps``, ``replicas``, ``seed``, ``largest_lr``, ``measured``
        (mean over steps and replicas of ‖∇F(θ_t)‖²), ``late`` (over the last half of the steps), ``bound``,
        ``bound_of_bounded_steps`` (with the longest step that was taken), ``floor`` (2ρ²).

    Raises:
        ValueError: no τ, a negative one, a step size or number out of range.
    """
    import pandas as pd

    require(len(taus) > 0, "taus", tuple(taus), "at least one")
    require(steps >= 1, "steps", steps, "a whole number of at least 1")
    require(replicas >= 1, "replicas", replicas, "a whole number of at least 1")
    for tau in taus:
        require(tau >= 0, "tau", tau, "a whole number of at least 0")
    constants = {solver: constants_of(problem, start, solver) for solver in solvers}
    rows = []
    for solver, own in constants.items():
        for lr in lrs or [fraction * own.largest_lr(max(taus)) for fraction in FRACTIONS]:
            for tau in taus:
                trace = np.full((steps, 1), tau)
                lag = float(np.minimum(trace[:, 0], np.arange(steps)).mean())
                above = bound(own, lr, steps, tau, lag)
                path = simulate(problem, start, lr, trace, replicas=replicas, solver=solver, seed=seed)
                squares, longest = path.squared_gradients, path.largest_step
                rows.append({
                    "solver": solver, "tau": tau, "lr": lr, "steps": steps, "replicas": replicas, "seed": seed,
                    "largest_lr": own.largest_lr(tau), "measured": float(squares.mean()),
                    "late": float(squares[steps // 2 :].mean()), "bound": above,
                    "bound_of_bounded_steps": bound_of_bounded_steps(own, lr, steps, tau, longest),
                    "floor": 2 * own.floor**2,
                })  # fmt: skip
    return pd.DataFrame(rows)


def figure_of_bound(rows: "pd.DataFrame", *, ax: "Axes | None" = None) -> "Axes":
    """Bound (lines) and measurement (markers) against τ, a colour a step size.

    Args:
        rows: of `compare`, one solver.
    """
    from matplotlib import pyplot as plt

    axes = ax if ax is not None else plt.gca()
    for (lr, own), (colour, marker) in zip(rows.groupby("lr"), cycle(STYLES), strict=False):
        own = own.sort_values("tau")
        axes.plot(own["tau"], own["bound"], color=colour, lw=1.6, label=f"bound, η = {lr:.3g}")
        axes.plot(own["tau"], own["measured"], marker, color=colour, ms=5, label=f"measured, η = {lr:.3g}")
    axes.set(xlabel="staleness τ (steps)", ylabel="mean ‖∇F(θ)‖²", yscale="log")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m conadv_lab.staleness theory``."""
    p = argparse.ArgumentParser(
        "conadv_lab.staleness theory", description="The bound beside what is measured on a quadratic problem."
    )
    p.add_argument(
        "--taus", type=int, nargs="+", default=list(range(17)), help="staleness (default: 0 to 16)"
    )
    p.add_argument(
        "--lrs", type=float, nargs="+", default=[], help="step sizes (default: three, see the docs)"
    )
    p.add_argument("--steps", type=int, default=3000, help="of a run (default: %(default)s)")
    p.add_argument("--replicas", type=int, default=64, help="runs that are averaged (default: %(default)s)")
    p.add_argument("--solver", default="exact", help="exact, ascent or sign (default: %(default)s)")
    p.add_argument("--size", type=int, default=8, help="dimension of θ and of x (default: %(default)s)")
    p.add_argument("--noise", type=float, default=0.3, help="s of the examples (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="examples of a step (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of problem and noise (default: %(default)s)")
    add_options(p)
    return p


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    asked = parser().parse_args(words)
    try:
        outputs = Outputs(asked.json, asked.csv, asked.figure)
        require(asked.size >= 1, "size", asked.size, "a whole number of at least 1")
        problem = example(asked.size, asked.noise, seed=asked.seed, batch=asked.batch)
        rows = evaluate(problem, asked)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    print_table(rows, asked.solver)
    outputs.write(rows, lambda: _picture(rows[rows["solver"] == asked.solver]))
    return 0


def evaluate(problem: Quadratic, asked: argparse.Namespace) -> "pd.DataFrame":
    """The rows that the command asks for, and one sign step at the smallest and the largest τ beside them."""
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
        print("\none sign step in place of the solver:")
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
