"""Compares the bound of docs/theory.md with measurements on the quadratic problem."""

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from conadv_lab.mistakes import require, require_count
from conadv_lab.staleness.theory.bound import Constants, bound, bound_of_bounded_steps
from conadv_lab.staleness.theory.quadratic import Array, Quadratic, inner_gap, simulate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FRACTIONS = (0.25, 0.5, 1.0)
"""Default step sizes, relative to the largest one that the bound covers at the largest τ."""
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#E69F00", "D"), ("#CC79A7", "v"))


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
    """Bound and measurement, one row for every solver, step size and τ.

    Args:
        lrs: step sizes; if empty: ¼, ½ and 1 times the largest one covered at the largest τ.

    Returns:
        Columns ``solver``, ``tau``, ``lr``, ``steps``, ``replicas``, ``seed``, ``largest_lr``, ``measured``
        (mean over steps and replicas of ‖∇F(θ_t)‖²), ``late`` (over the last half of the steps), ``bound``,
        ``bound_of_bounded_steps`` (with the longest step taken), ``floor`` (2ρ²).

    Raises:
        ValueError: no τ, a negative one, a step size or number out of range.
    """
    import pandas as pd

    require(len(taus) > 0, "taus", tuple(taus), "at least one")
    require_count(steps=steps, replicas=replicas)
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
    """Bound (lines) and measurement (markers) against τ, one colour per step size.

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
