"""Measures from gradients: batch sharpness, gradient noise scale, Fisher–Rao norm, lr·λmax."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conadv_lab.mistakes import FROM_0, require
from conadv_lab.reading import fits
from conadv_lab.sharpness.measures.study import UNCHANGED, Outcome, Study, register
from conadv_lab.sharpness.operators.matrices import Fisher, Hessian
from conadv_lab.sharpness.problem.groups import group_mean, groups
from conadv_lab.sharpness.problem.precision import trusted
from conadv_lab.sharpness.spectrum.trace import sign_vector


@register("batch_sharpness")
def batch_sharpness(study: Study) -> Outcome:
    """The mean over batches of g_Bᵀ H_B g_B / ‖g_B‖² (Andreyev and Beneventano 2024, def. 1).

    Over the batches as given, or groups of ``m``; the error is a standard error over them. Mini-batch gradient descent
    keeps it near 2/lr. Rescaling the layers changes it.
    """
    samples: list[float] = []
    shares: list[float] = []
    for group, share in groups(study.problem, study.settings.m):
        _, gradient = group.value_and_gradient()
        hessian = Hessian(group, planned=1)
        image = hessian @ gradient
        if not samples and not study.symmetry_seen:
            hessian @ sign_vector(hessian, study.seed, 0)  # a second product, so that symmetry can be checked
        samples.append(float(gradient @ image) / max(float(gradient.square().sum()), 1e-300))
        shares.append(share)
    told = {"m": study.settings.m or max(study.problem.batch_sizes), "groups": len(samples), "gradients": 1}
    value, error = group_mean(study.problem, samples, shares)
    return Outcome(value, error, 1, told)


def noise_scale(sizes: Sequence[int], squares: Sequence[float], whole: float) -> float:
    """tr(Σ)/|G|² from gradients of groups (McCandlish et al. 2018, eqs. A.2 to A.4).

    With E|g_B|² = |G|² + tr(Σ)/B for a group of B examples, the groups' mean square and that of all N
    examples give two equations for the two unknowns.

    Args:
        sizes: examples of each group; N is their sum.
        squares: |g_B|² of each.
        whole: |g_N|² of all examples.
    """
    total = sum(sizes)
    mean_square = float(np.average(squares, weights=sizes))
    inverse = len(sizes) / total  # the mean of 1/B, weighted by examples
    spread = (mean_square - whole) / (inverse - 1 / total)
    return spread / (whole - spread / total)


@register("gradient_noise_scale")
def gradient_noise_scale(study: Study) -> Outcome:
    """The batch size, in examples, at which gradient noise equals signal (McCandlish et al. 2018, eq. 2.9).

    Near a minimum the signal is small and the value means little: it may be negative. The error is the jackknife
    standard error over groups; rescaling the layers changes it.

    Raises:
        ValueError: fewer than three groups (use smaller batches or ``m``), or data split over ranks.
    """
    require(not study.problem.all_reduce, "gradient_noise_scale's all_reduce", True, "data on one rank alone")
    study.problem.mean.require_alike("gradient_noise_scale")
    sizes, squares, gradients = [], [], []
    for group, _ in groups(study.problem, study.settings.m):
        gradient = group.value_and_gradient()[1].double()
        sizes.append(group.examples)
        squares.append(float(gradient.square().sum()))
        gradients.append(gradient)
    count = len(sizes)
    if count < 3:
        raise ValueError(
            f"gradient_noise_scale has {count} groups; allowed: at least 3; use a smaller m or smaller batches"
        )
    weighted: Tensor = torch.stack([g * b for g, b in zip(gradients, sizes, strict=True)])
    sums = weighted.sum(0)

    def estimate(left_out: int | None) -> float:
        kept = [i for i in range(count) if i != left_out]
        vector = sums if left_out is None else sums - weighted[left_out]
        some = [sizes[i] for i in kept]
        return noise_scale(some, [squares[i] for i in kept], float((vector / sum(some)).square().sum()))

    value = estimate(None)
    without = np.array([estimate(i) for i in range(count)])
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    return Outcome(value, error, 0, {"groups": count, "m": max(sizes), "gradients": 1})


@register("fisher_rao", UNCHANGED)
def fisher_rao(study: Study) -> Outcome:
    """wᵀFw (Liang et al. 2019, def. 2), F the Fisher matrix of the model's own predictions.

    A rescaling of the layers that keeps the function leaves it unchanged.
    """
    weights = study.problem.weights()
    fisher = Fisher(study.problem, likelihood=study.settings.likelihood, planned=1)
    value = float(weights.double() @ (fisher @ weights).double())
    rounding = abs(value) * trusted(study.problem.roundoff)
    return Outcome(value, rounding, 1, {"likelihood": study.settings.likelihood, "matrix": "Fisher"})


@register("lr_lambda_max")
def lr_lambda_max(study: Study) -> Outcome:
    """Learning rate times λmax: near 2 at the edge of stability (Cohen et al. 2021).

    Sharpness of runs with different learning rates partly reflects the learning rate; this shows how far. Rescaling
    the layers changes it.

    Raises:
        ValueError: ``facts`` has no learning rate.
    """
    rate: Any = study.facts.get("learning_rate")
    if not fits(rate, float) or not FROM_0[0](rate):
        raise ValueError(
            f"lr_lambda_max has learning_rate {rate!r}; allowed: a number of at least 0 in facts['learning_rate']"
        )
    found = study.eigen(1)
    told = {"converged": found.converged, "matrix": "Hessian"}
    return Outcome(rate * float(found.values[0]), rate * float(found.bounds[0]), found.products, told)
