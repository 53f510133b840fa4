"""A problem's data split into groups, each a problem with its share of the whole."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from conadv_lab.sharpness.problem.nests import cpu, first_tensor, take
from conadv_lab.sharpness.problem.problem import Problem


def groups(problem: Problem, m: int | None = None) -> Iterator[tuple[Problem, float]]:
    """The data in disjoint groups of at most ``m`` examples (``None``: the batches as given), each with its share.

    A group is a separate problem on one rank; if ``m`` does not divide a batch, its last group is smaller.
    """
    with problem.untouched():
        for inputs, targets, share in problem.data():
            size = first_tensor(inputs).shape[0]
            for start in range(0, size, m or size):
                part = slice(start, min(start + (m or size), size))
                of_part = share_of(problem, inputs, targets, part, share)
                if of_part > 0:
                    group = copy.copy(problem)
                    group.use([(take(inputs, part), take(targets, part))])
                    yield group, of_part


def share_of(problem: Problem, inputs: Any, targets: Any, part: slice, share: float) -> float:
    """The share of part of a batch, given the batch's share; 0 if none of its labels count."""
    size, count = first_tensor(inputs).shape[0], part.stop - part.start
    if count == size or problem.mean.over_examples:
        return share * count / size
    inputs, targets = take(inputs, part), take(targets, part)
    with torch.no_grad():
        return problem.mean.of(problem.outputs(problem.leaves(), inputs), targets, count) / problem.counted


def group_mean(
    problem: Problem, samples: Sequence[float], shares: Sequence[float]
) -> tuple[float, float | None]:
    """The mean over groups of all ranks, weighted by share, and its standard error (``None`` for one group)."""
    x = cpu(samples)
    weighted = float((x * cpu(shares)).sum())
    sums = problem.reduced(cpu([weighted, float(len(x)), float(x.sum())])).cpu()
    count, centre = float(sums[1]), float(sums[2] / sums[1])
    spread = problem.reduced((x - centre).square().sum())
    error = (float(spread) / (count - 1) / count) ** 0.5 if count > 1 else None
    return float(sums[0]), error
