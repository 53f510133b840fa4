"""Keskar's sharpness: the highest loss in a small box, in the whole space or in a random subspace."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from conadv_lab.mistakes import require
from conadv_lab.sharpness.measures.study import Outcome, Study, register
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import normal_vector

ITERATIONS = 10


def keskar_sharpness(
    problem: Problem, epsilon: float, subspace: int | None = None, seed: int = 0
) -> tuple[float, int]:
    """100 · max_{z∈C} [f(x+Az) − f(x)] / (1+f(x)), C: |zᵢ| ≤ ε(|(A⁺x)ᵢ|+1) (Keskar et al. 2017, eqs. 3, 4).

    The formula is from memory and a summary, not checked against the paper. A second derivation confirms its box: for
    small ε the loss is linear in the box, so with A = I the value tends to 100·ε·Σᵢ|gᵢ|(|wᵢ|+1)/(1+f), the dual norm
    of the box; a test checks that.

    A is the identity, or has ``subspace`` random columns, of unit length by our choice. L-BFGS-B runs for
    ten iterations, starting half-way to the corner that the gradient points to, and that corner is tried as well;
    the best value is a lower bound of the maximum, never below 0.

    Returns:
        The sharpness, and the number of gradients used.
    """
    require(epsilon > 0, "epsilon", epsilon, "a number above 0")
    weights = problem.weights()
    if subspace is None:
        up: Callable[[Tensor], Tensor] = lambda z: z  # noqa: E731
        down, centre = up, weights
    else:
        require(subspace >= 1, "subspace", subspace, "a whole number of at least 1")
        matrix = torch.stack([
            normal_vector(problem, seed, 50_000 + i) for i in range(subspace)  # type: ignore[arg-type]
        ], 1)  # fmt: skip
        matrix = matrix / matrix.norm(dim=0)
        up, down = (lambda z: matrix @ z), (lambda g: matrix.T @ g)
        centre = torch.linalg.lstsq(matrix, weights[:, None]).solution[:, 0]
    box = (epsilon * (centre.abs() + 1)).double().cpu().numpy()
    base = problem.value()
    best, calls = base, 0

    def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, calls
        calls += 1
        point = weights + up(torch.as_tensor(z, dtype=weights.dtype, device=weights.device))
        value, gradient = problem.value_and_gradient(point)
        best = max(best, value)
        return -value, -down(gradient).double().cpu().numpy()

    _, slope = negative(np.zeros_like(box))
    corner = box * np.where(slope > 0, -1.0, 1.0)
    negative(corner)
    minimize(  # no tolerances: SciPy's defaults stop at once in a small box
        negative, 0.5 * corner, jac=True, method="L-BFGS-B", bounds=list(zip(-box, box, strict=True)),
        options={"maxiter": ITERATIONS, "ftol": 0.0, "gtol": 0.0},
    )  # fmt: skip
    return 100 * (best - base) / (1 + base), calls


def _over(study: Study, subspace: int | None) -> Outcome:
    values, gradients = {}, 0
    for epsilon in study.settings.keskar_epsilons:
        values[float(epsilon)], calls = keskar_sharpness(study.problem, epsilon, subspace, study.seed)
        gradients += calls
    told = {"gradients": gradients, "iterations": ITERATIONS, "subspace": subspace, "note": "a lower bound"}
    return Outcome(values, None, 0, told)


@register("keskar")
def keskar(study: Study) -> Outcome:
    """Keskar's sharpness in the whole space at each ε, in per cent; see :func:`keskar_sharpness`.

    The +1 in the box breaks invariance: rescaling the layers changes it.
    """
    return _over(study, None)


@register("keskar_subspace")
def keskar_subspace(study: Study) -> Outcome:
    """Keskar's sharpness in a random subspace of ``subspace`` dimensions; rescaling changes it."""
    return _over(study, min(study.settings.subspace, study.problem.size))
