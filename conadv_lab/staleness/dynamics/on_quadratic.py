"""Stale attacks on the quadratic problem, with the same rows as `study`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conadv_lab.mistakes import COUNT, require, require_ranges
from conadv_lab.staleness.draws import Draw
from conadv_lab.staleness.dynamics.frame import WHOLE, tidy
from conadv_lab.staleness.dynamics.options import QuadraticOptions
from conadv_lab.staleness.theory.quadratic import Array, Quadratic, example, simulate, solve

if TYPE_CHECKING:
    import pandas as pd


def study(draws: Sequence[Draw], asked: QuadraticOptions) -> "pd.DataFrame":
    """Simulate every distribution of τ with every seed.

    Returns:
        The columns of `frame.tidy`. Measures of a probe as there, with Bᵀθ as the input gradient at the clean image,
        each a mean over the replicas; measures of a run: ``squared_gradient``, the mean of ‖∇F‖² over the last half,
        ``objective`` and ``top_eigenvalue`` of F at its end.

    Raises:
        ValueError: a number out of range, or a trace that is too short.
    """
    require(0 < asked.lr < float("inf"), "lr", asked.lr, "a number above 0")
    require_ranges(asked, probe_every=COUNT, steps=COUNT, replicas=COUNT)
    problem = example(noise=asked.noise, seed=asked.seed)
    seeds = range(asked.seed, asked.seed + asked.seeds)
    jobs = [(draw, seed, draw.array(asked.steps, seed)) for draw in draws for seed in seeds]
    rows: list[dict[str, Any]] = []
    for draw, seed, taus in jobs:
        about = {
            "problem": "quadratic", "draw": draw.kind, "tau": draw.mean, "workers": draw.columns, "seed": seed,
            "lr": asked.lr,
        }  # fmt: skip
        rows += [about | row for row in _run(problem, taus, asked, seed)]
    return tidy(rows)


def _run(problem: Quadratic, taus: Any, asked: QuadraticOptions, seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lags = np.minimum(taus, np.arange(len(taus))[:, None])

    def watch(t: int, theta: Array, seen: list[Array]) -> None:
        if t % asked.probe_every:
            return
        for worker, old in enumerate(seen):
            about = {
                "step": t, "phase": "early" if t < asked.steps / 2 else "late", "worker": worker,
                "effective_tau": int(lags[t, worker]), "tau_lr": float(lags[t, worker] * asked.lr),
            }  # fmt: skip
            values = _compared(problem, theta, old, asked.solver)
            rows.extend(about | {"measure": name, "value": value} for name, value in values.items())

    start = np.full(len(problem.a), 0.5)
    path = simulate(
        problem, start, asked.lr, taus, replicas=asked.replicas, solver=asked.solver, seed=seed, watch=watch
    )
    mean = float(lags.mean())
    about = {
        "step": asked.steps, "phase": WHOLE, "worker": float("nan"),
        "effective_tau": mean, "tau_lr": mean * asked.lr,
    }  # fmt: skip
    values = {
        "squared_gradient": float(path.squared_gradients[asked.steps // 2 :].mean()),
        "objective": float(problem.objective(path.theta).mean()),
        "top_eigenvalue": float(np.mean([problem.top_eigenvalue(theta) for theta in path.theta])),
    }
    return rows + [about | {"measure": name, "value": value} for name, value in values.items()]


def _compared(problem: Quadratic, theta: Array, old: Array, solver: str) -> dict[str, float]:
    same = (problem.pull(theta) >= 0) == (problem.pull(old) >= 0)
    stale = problem.gain(theta, solve(problem, old, solver)).mean()
    fresh = problem.gain(theta, solve(problem, theta, solver)).mean()
    return {
        "sign_agreement": float(same.mean()),
        "gain_ratio": float(stale / fresh) if fresh > 0 else float("nan"),
        "distance": float(np.sqrt(((theta - old) ** 2).sum(-1)).mean()),
    }
