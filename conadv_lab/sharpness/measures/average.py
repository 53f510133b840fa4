"""Average-case sharpness: the mean loss under random perturbations of the weights."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from conadv_lab.mistakes import require
from conadv_lab.sharpness.measures.study import UNCHANGED, Outcome, Study, register
from conadv_lab.sharpness.problem.means import labels_that_count
from conadv_lab.sharpness.problem.nests import first_tensor
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import normal_vector

TARGET_DROP = 0.1


def average_rise(
    problem: Problem, perturbation: Callable[[Tensor], Tensor], draws: int, confidence: float, seed: int
) -> tuple[float, float]:
    """E L(w+d) − L(w) and its interval's half-width, d = perturbation(z) for standard normal z.

    Each z is paired with −z: this cancels the linear term, which has mean zero but most of the variance.
    """
    require(draws >= 2, "draws", draws, "a whole number of at least 2")
    weights, base = problem.weights(), problem.value()
    samples = []
    for index in range(draws):
        d = perturbation(normal_vector(problem, seed, 30_000 + index))  # type: ignore[arg-type]
        samples.append((problem.value(weights + d) + problem.value(weights - d)) / 2 - base)
    quantile = float(stats.t.ppf((1 + confidence) / 2, draws - 1))
    return float(np.mean(samples)), quantile * float(np.std(samples, ddof=1)) / math.sqrt(draws)


def _over(study: Study, rhos: Sequence[float], rule: Callable[[Tensor, float], Tensor]) -> Outcome:
    s = study.settings
    values, errors = {}, {}
    for rho in rhos:
        require(rho > 0, "rho", rho, "a radius above 0")
        perturbation = partial(_fixed, rule, rho)
        found = average_rise(study.problem, perturbation, s.draws, s.confidence, study.seed)
        values[float(rho)], errors[float(rho)] = found
    told = {"draws": s.draws, "confidence": s.confidence, "forwards": (2 * s.draws + 1) * len(rhos)}
    return Outcome(values, errors, 0, told)


def _fixed(rule: Callable[[Tensor, float], Tensor], rho: float, z: Tensor) -> Tensor:
    return rule(z, rho)


def _sphere(study: Study) -> Outcome:
    return _over(study, study.settings.rhos, lambda z, rho: z * (rho / z.norm()))


def _relative(study: Study) -> Outcome:
    scale = study.problem.weights().abs()
    return _over(study, study.settings.relative_rhos, lambda z, rho: rho * scale * z)


@register("sam_average")
def sam_average(study: Study) -> Outcome:
    """E L(w+d) − L(w), d uniform on the sphere ‖d‖₂ = ρ, at the radii of ``sam_worst``.

    (ρ²/2n)·tr(H) for small ρ. Rescaling the layers changes it.
    """
    return _sphere(study)


@register("sam_average_logit_normalised")
def sam_average_logit_normalised(study: Study) -> Outcome:
    """``sam_average`` of the loss on normalised logits; changes with the inner layers' scales."""
    return _sphere(study.normalised)


@register("adaptive_average", UNCHANGED)
def adaptive_average(study: Study) -> Outcome:
    """E L(w+d) − L(w), d ~ N(0, ρ²·diag(w²)) (Andriushchenko et al. 2023, eq. 2).

    (ρ²/2)·tr(CHC) for small ρ, C = diag|w|. A rescaling of the layers that keeps the function leaves it
    unchanged.
    """
    return _relative(study)


@register("adaptive_average_logit_normalised", UNCHANGED)
def adaptive_average_logit_normalised(study: Study) -> Outcome:
    """``adaptive_average`` of the loss on normalised logits: the last layer's scale cancels too."""
    return _relative(study.normalised)


def accuracy(problem: Problem, vector: Tensor | None = None) -> float:
    """The fraction of examples (or positions) that are classified correctly at ``vector``.

    Labels that the criterion ignores do not count.

    Raises:
        ValueError: the targets are not class labels.
    """
    problem.require_one_output("accuracy")
    parts = problem.split(problem.weights() if vector is None else vector)
    right = total = 0
    with problem.untouched(), torch.no_grad():
        for inputs, targets, _ in problem.data():
            output = problem.outputs(parts, inputs)
            whole = isinstance(targets, Tensor) and not targets.is_floating_point()
            if not whole or output.ndim != targets.ndim + 1:
                shape = tuple(first_tensor(targets).shape)
                raise ValueError(
                    f"accuracy needs class labels as targets; got {shape} beside {tuple(output.shape)}"
                )
            right += int((output.argmax(1) == targets).sum())
            total += int(labels_that_count(problem.criterion, targets).sum())
    counts = problem.reduced(torch.tensor([float(right), float(total)], dtype=torch.float64, device="cpu"))
    return float(counts[0] / counts[1])


def widest_noise(problem: Problem, width: Callable[[float], Tensor], draws: Sequence[Tensor]) -> float:
    """σ at which the mean accuracy over noise samples is 0.1 below that without noise, by bisection of log σ.

    Raises:
        ValueError: no σ from 1e-5 to 1000 lowers the accuracy that much.
    """
    weights, target = problem.weights(), accuracy(problem) - TARGET_DROP

    def enough(sigma: float) -> bool:
        return float(np.mean([accuracy(problem, weights + width(sigma) * z) for z in draws])) >= target

    low, high = 1e-5, 1e-5
    if not enough(low):
        raise ValueError(
            f"noise of sigma {low}, where the search starts, already lowers the accuracy by {TARGET_DROP}"
        )
    while enough(high):
        low, high = high, high * 4
        if high > 1e3:
            raise ValueError(
                f"no noise lowers the accuracy by {TARGET_DROP}; the model is hardly better than chance"
            )
    for _ in range(8):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return math.sqrt(low * high)


def _flatness(study: Study, width: Callable[[float], Tensor]) -> Outcome:
    draws = [normal_vector(study.problem, study.seed, 40_000 + i) for i in range(study.settings.draws)]  # type: ignore[arg-type]
    whole = widest_noise(study.problem, width, draws)
    halves = [widest_noise(study.problem, width, part) for part in (draws[::2], draws[1::2])]
    error = abs(halves[0] ** -2 - halves[1] ** -2) / 2
    told = {
        "sigma": whole,
        "draws": len(draws),
        "error_is": "half the difference between the two halves of the samples",
    }
    return Outcome(whole**-2, error, 0, told | {"accuracy": accuracy(study.problem)})


@register("pac_bayes_flatness")
def pac_bayes_flatness(study: Study) -> Outcome:
    """1/σ² for the σ at which u ~ N(0, σ²I) lowers the accuracy by 0.1 (Jiang et al. 2020, measure 52).

    The measure's number is from memory. Large means sharp. Rescaling the layers changes it.
    """
    ones = torch.ones_like(study.problem.weights())
    return _flatness(study, lambda sigma: sigma * ones)


def magnitude_width(weights: Tensor, sigma: float) -> Tensor:
    """The standard deviations √(σ²w² + 10⁻⁶) of magnitude-aware noise, shape ``(size,)``."""
    return (sigma**2 * weights.square() + 1e-6).sqrt()


@register("pac_bayes_flatness_magnitude")
def pac_bayes_flatness_magnitude(study: Study) -> Outcome:
    """1/σ² for uᵢ ~ N(0, σ²wᵢ² + 10⁻⁶) (Jiang et al. 2020, measure 56).

    Formula and number of the measure are from memory, not checked against the paper. The code published with
    Dziugaite et al. (2020) passes σ²wᵢ² + (10⁻³)² to its generator as a standard deviation, where the formula makes
    it a variance; others take its root, as here. For small σ the loss rises by ½Σ(σ²wᵢ² + 10⁻⁶)Hᵢᵢ, which a test
    checks. Without the 10⁻⁶ rescaling the layers would leave it unchanged; small weights make it change.
    """
    weights = study.problem.weights()
    return _flatness(study, partial(magnitude_width, weights))
