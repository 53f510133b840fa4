"""The loss along lines and over planes: filter-normalised, along eigenvectors, between two solutions."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conadv_lab.mistakes import require
from conadv_lab.sharpness.measures.results import Measure, Report
from conadv_lab.sharpness.measures.study import MOVES, UNCHANGED, Outcome, Study, register
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import normal_vector
from conadv_lab.sharpness.spectrum.journal import Journal


@dataclass(frozen=True)
class Landscape:
    """Losses at w + Σ aᵢdᵢ.

    Attributes:
        axes: one array of coordinates for each direction.
        losses: shape ``(len(axes[0]), len(axes[1]), …)``, indexed as the axes are.
    """

    axes: tuple[np.ndarray, ...]
    losses: np.ndarray


def filter_normalised(problem: Problem, direction: Tensor) -> Tensor:
    """Scale every filter of a direction to the norm of its weights (Li et al. 2018, sec. 4): d_ij·‖w_ij‖/‖d_ij‖.

    A filter is a row of a weight with two or more axes. Biases and normalisation parameters, with one axis, do not
    move, as in the paper. Losses along the direction are then invariant to rescalings that keep the function.

    Args:
        direction: shape ``(size,)``; not modified.
    """
    parts = []
    pairs = zip(problem.split(problem.weights()), problem.split(direction), strict=True)
    for name, (weight, part) in zip(problem.names, pairs, strict=True):
        if weight.ndim - (name in problem.complex_names) < 2:
            parts.append(torch.zeros_like(part))
            continue
        rows, along = weight.flatten(1), part.flatten(1)
        scale = rows.norm(dim=1, keepdim=True) / along.norm(dim=1, keepdim=True).clamp_min(1e-30)
        parts.append((along * scale).view_as(weight))
    return problem.flat(parts)


def random_direction(problem: Problem, seed: int = 0, index: int = 0) -> Tensor:
    """A filter-normalised random direction, shape ``(size,)``; each ``index`` gives another one."""
    return filter_normalised(problem, normal_vector(problem, seed, 60_000 + index))  # type: ignore[arg-type]


def landscape(
    problem: Problem,
    directions: Sequence[Tensor],
    axes: Sequence[Sequence[float] | np.ndarray],
    *,
    journal: Journal | None = None,
    name: str = "landscape",
) -> Landscape:
    """The mean loss at every point of a grid along one or two directions; one forward pass over the data per
    point.

    The model's weights are not changed. With a journal finished points are stored and not recomputed.

    Raises:
        ValueError: not one or two directions, or a different number of axes.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> problem = Problem(model, torch.nn.functional.mse_loss, (one, 0 * one))
    >>> losses = landscape(problem, [-problem.weights()], [[0.0, 0.5, 1.0]]).losses
    >>> (losses / losses[0]).tolist()
    [1.0, 0.25, 0.0]
    """
    require(len(directions) in (1, 2), "directions", len(directions), "one or two")
    require(len(axes) == len(directions), "axes", len(axes), f"{len(directions)}, one for each direction")
    coordinates = tuple(np.asarray(axis, dtype=float) for axis in axes)
    shape = tuple(len(axis) for axis in coordinates)
    weights = problem.weights()

    def value(place: int) -> float:
        point = weights.clone()
        for axis, i, direction in zip(coordinates, np.unravel_index(place, shape), directions, strict=True):
            point += float(axis[i]) * direction
        return problem.value(point)

    flat = _filled(value, int(np.prod(shape)), journal, name)
    return Landscape(coordinates, flat.reshape(shape))


def _filled(value: Callable[[int], float], count: int, journal: Journal | None, name: str) -> np.ndarray:
    """``value`` at every point; those stored in the journal are not recomputed."""
    flat = np.full(count, np.nan)
    kept = journal.get(name) if journal else None
    if kept is not None:
        flat = kept.numpy().copy()
    for place in np.flatnonzero(np.isnan(flat)):
        flat[place] = value(int(place))
        if journal and (journal.due or place == count - 1):
            journal.put(name, torch.from_numpy(flat.copy()))
    return flat


def between(
    first: Problem,
    second: Problem,
    positions: Sequence[float] | np.ndarray,
    *,
    journal: Journal | None = None,
    name: str = "between",
) -> Landscape:
    """The loss on the straight line from one solution (position 0) to another (1) of the same network.

    Goodfellow et al. (2015), "Qualitatively characterizing neural network optimization problems". Floating-point
    buffers, such as running statistics, are interpolated too; data and criterion are the first problem's.
    With a journal finished points are stored.

    Raises:
        ValueError: the problems' parameters differ in name or shape.
    """
    require(
        first.names == second.names, "the second problem's parameters", second.names, "those of the first"
    )
    require(first.shapes == second.shapes, "the second problem's shapes", second.shapes, "those of the first")
    start, direction = first.weights(), second.weights() - first.weights()
    coordinates = np.asarray(positions, dtype=float)

    def value(place: int) -> float:
        point, position = copy.copy(first), float(coordinates[place])
        point.buffers = {
            key: torch.lerp(b, second.buffers[key].to(b), position) if b.is_floating_point() else b
            for key, b in first.buffers.items()
        }
        return point.value(start + position * direction)

    return Landscape((coordinates,), _filled(value, len(coordinates), journal, name))


def line_to(
    report: Report, problem: Problem, end: Problem, name: str, resume: Path | None = None, points: int = 21
) -> Report:
    """The report with an additional measure, ``landscape_between``: :func:`between` from position −0.25 to 1.25."""
    start = time.perf_counter()
    norms = [float(p.weights().norm()) for p in (problem, end)]
    journal = Journal(resume, {"data": problem.data_hash, "norms": norms, "points": points})
    found = between(problem, end, np.linspace(-0.25, 1.25, points), journal=journal)
    value = {"axes": [found.axes[0].tolist()], "losses": found.losses.tolist()}
    conditions = dict(report.measures[0].conditions) if report.measures else {}
    told = {"directions": f"the line to {name}, at position 1", "forwards": points, "under_rescaling": MOVES}
    seconds = time.perf_counter() - start
    one = Measure("landscape_between", value, None, 0, seconds, conditions | told)
    return Report((*report.measures, one))


def _told(found: Landscape, what: str) -> Outcome:
    value = {"axes": [axis.tolist() for axis in found.axes], "losses": found.losses.tolist()}
    return Outcome(value, None, 0, {"directions": what, "forwards": found.losses.size})


@register("landscape_line", UNCHANGED)
def landscape_line(study: Study) -> Outcome:
    """The loss along one random filter-normalised direction, 21 points from −1 to 1 (Li et al. 2018)."""
    direction = random_direction(study.problem, study.seed)
    axes = [np.linspace(-1, 1, 21)]
    found = landscape(study.problem, [direction], axes, journal=study.journal, name="line")
    return _told(found, "random, filter-normalised")


@register("landscape_plane", UNCHANGED)
def landscape_plane(study: Study) -> Outcome:
    """The loss over two random filter-normalised directions, 15 × 15 points from −1 to 1 (Li et al. 2018)."""
    directions = [random_direction(study.problem, study.seed, i) for i in range(2)]
    axes = [np.linspace(-1, 1, 15)] * 2
    found = landscape(study.problem, directions, axes, journal=study.journal, name="plane")
    return _told(found, "random, filter-normalised")


@register("landscape_eigen")
def landscape_eigen(study: Study) -> Outcome:
    """The loss over the Hessian's two top eigenvectors, 15 × 15 points (Yao et al. 2020).

    The axes are in multiples of √(2/λ₁), at which the quadratic model rises by one on the first axis. Rescaling the
    layers changes it.
    """
    found = study.eigen(2)
    unit = float(np.sqrt(2 / max(abs(float(found.values[0])), 1e-12)))
    directions = [unit * vector for vector in found.vectors[:2]]  # another measure may have computed more
    axes = [np.linspace(-1, 1, 15)] * len(directions)
    grid = landscape(study.problem, directions, axes, journal=study.journal, name="eigen")
    return _told(grid, f"top eigenvectors, unit {unit:.6g}")
