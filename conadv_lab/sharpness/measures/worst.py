"""Worst-case sharpness: the highest loss within a ball around the weights, plain or adaptive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conadv_lab.mistakes import require
from conadv_lab.sharpness.measures.study import UNCHANGED, Outcome, Settings, Study, register
from conadv_lab.sharpness.problem.groups import group_mean, groups
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import normal_vector


@dataclass(frozen=True)
class Ascent:
    """The result of a maximisation over a ball.

    Attributes:
        rise: the loss at the best point found minus the loss at the centre; never below ``one_step``.
        one_step: the rise after one gradient step to the ball's surface (Foret et al. 2021, eq. 2).
        first_order: ρ‖c∘g‖, what the gradient alone predicts.
        point: the best u, shape ``(size,)``; the perturbation is c∘u.
        gradients: number of loss gradients used.
    """

    rise: float
    one_step: float
    first_order: float
    point: Tensor
    gradients: int


def _project(u: Tensor, rho: float) -> Tensor:
    norm = float(u.norm())
    return u * (rho / norm) if norm > rho else u


def ascend(
    problem: Problem,
    rho: float,
    scale: Tensor | None = None,
    *,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
    starts: Sequence[Tensor] = (),
) -> Ascent:
    """max over ‖u‖₂ ≤ ρ of L(w + c∘u) − L(w), by projected gradient ascent from several starts.

    The first start is the one-step point, the others are random on the sphere. Steps of length η·ρ follow the gradient
    in u; η is halved when the loss does not rise. The best point overall is returned. It is a lower bound of the
    maximum with unknown error.

    Args:
        scale: c ≥ 0, shape ``(size,)``; ``None``: 1.
        starts: additional starting points, such as the result at a smaller ρ.

    Raises:
        ValueError: ``rho`` is not above 0.
    """
    require(rho > 0, "rho", rho, "a radius above 0")
    weights = problem.weights()
    c = torch.ones_like(weights) if scale is None else scale
    base, gradient = problem.value_and_gradient()
    slope = c * gradient
    norm = float(slope.norm())

    def at(u: Tensor) -> tuple[float, Tensor]:
        value, g = problem.value_and_gradient(weights + c * u)
        return value - base, c * g

    one = slope * (rho / norm) if norm > 0 else _project(torch.full_like(weights, rho), rho)
    random = [normal_vector(problem, seed, 20_000 + i) for i in range(restarts)]  # type: ignore[arg-type]
    best, best_point, one_step, spent = -np.inf, one, 0.0, 1
    for index, start in enumerate([one, *starts, *(z * (rho / z.norm()) for z in random)]):
        rise, point, first, used = _climb(at, _project(start, rho), rho, steps)
        spent += used
        one_step = first if index == 0 else one_step
        if rise > best:
            best, best_point = rise, point
    return Ascent(best, one_step, rho * norm, best_point, spent)


def _climb(
    at: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, rho: float, steps: int
) -> tuple[float, Tensor, float, int]:
    """Best rise, its point, the rise at the start, and the number of gradients used."""
    point = start
    rise, slope = at(point)
    first, length = rise, 1.0
    for _ in range(steps):
        norm = float(slope.norm())
        if norm == 0 or length < 1e-3:
            break
        trial = _project(point + slope * (length * rho / norm), rho)
        value, new_slope = at(trial)
        if value > rise:
            point, rise, slope = trial, value, new_slope
        else:
            length /= 2
    return rise, point, first, steps + 1


def over_radii(
    problem: Problem, rhos: Sequence[float], scale: Tensor | None, settings: Settings, seed: int
) -> dict[float, Ascent]:
    """The ascent at each ρ, also started from the result at the next smaller one, so that it grows with ρ."""
    results: dict[float, Ascent] = {}
    starts: list[Tensor] = []
    for rho in sorted(rhos):
        results[rho] = ascend(
            problem, rho, scale, steps=settings.ascent_steps, restarts=settings.restarts, seed=seed,
            starts=starts,
        )  # fmt: skip
        starts = [results[rho].point]
    return results


def _outcome(results: dict[float, Ascent], **told: object) -> Outcome:
    notes = {
        "one_step": {float(r): a.one_step for r, a in results.items()},
        "first_order": {float(r): a.first_order for r, a in results.items()},
        "gradients": sum(a.gradients for a in results.values()),
        "note": "a lower bound of the maximum: the best point that the ascent found",
    }
    return Outcome({float(r): a.rise for r, a in results.items()}, None, 0, notes | told)


def _plain(study: Study) -> Outcome:
    return _outcome(over_radii(study.problem, study.settings.rhos, None, study.settings, study.seed))


def _adaptive(study: Study) -> Outcome:
    scale = study.problem.weights().abs()
    return _outcome(
        over_radii(study.problem, study.settings.adaptive_rhos, scale, study.settings, study.seed)
    )


@register("sam_worst")
def sam_worst(study: Study) -> Outcome:
    """max_{‖d‖₂≤ρ} L(w+d) − L(w) at each ρ (Foret et al. 2021, eq. 1), over all the data at once.

    Rescaling the layers with the function unchanged changes it.
    """
    return _plain(study)


@register("sam_worst_logit_normalised")
def sam_worst_logit_normalised(study: Study) -> Outcome:
    """``sam_worst`` of the loss on normalised logits; only the last layer's scale cancels."""
    return _plain(study.normalised)


@register("adaptive_worst", UNCHANGED)
def adaptive_worst(study: Study) -> Outcome:
    """max_{‖d/|w|‖₂≤ρ} L(w+d) − L(w) at each ρ (Kwon et al. 2021, eq. 3, with T_w = diag|w|).

    At a critical point (ρ²/2)·λmax(CHC) for small ρ. Rescaling the layers with the function unchanged leaves it
    unchanged; the scale of the last layer, which changes the function, changes it.
    """
    return _adaptive(study)


@register("adaptive_worst_logit_normalised", UNCHANGED)
def adaptive_worst_logit_normalised(study: Study) -> Outcome:
    """``adaptive_worst`` of the loss on normalised logits, where all scales cancel."""
    return _adaptive(study.normalised)


@register("m_sharpness")
def m_sharpness(study: Study) -> Outcome:
    """The mean over disjoint groups B of m of max_{‖d‖≤ρ} L_B(w+d) − L_B(w), at the first of ``rhos``.

    Foret et al. 2021, sec. 4.1. ``value`` is a number, ``error`` its standard error over groups. It falls as
    m grows. Rescaling the layers changes it.
    """
    s, rho = study.settings, study.settings.rhos[0]
    rises, shares, gradients = [], [], 0
    for group, share in groups(study.problem, s.m):
        found = ascend(group, rho, steps=s.ascent_steps, restarts=0, seed=study.seed)
        rises.append(found.rise)
        shares.append(share)
        gradients += found.gradients
    told = {"rho": rho, "m": s.m or max(study.problem.batch_sizes), "groups": len(rises)}
    value, error = group_mean(study.problem, rises, shares)
    return Outcome(value, error, 0, told | {"gradients": gradients / len(rises)})
