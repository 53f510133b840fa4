"""Sharpness with respect to inputs: the gradient of the loss in an image, and accuracy under small attacks."""

import math

import numpy as np
import torch
from torch import Tensor

from conadv_lab.data.loader import Batch
from conadv_lab.methods.robustness import EvaluationAttack, right_under_attack
from conadv_lab.mistakes import require
from conadv_lab.sharpness.measures.study import UNCHANGED, Outcome, Study, register
from conadv_lab.sharpness.problem.means import labels_that_count
from conadv_lab.sharpness.problem.problem import Problem


def input_gradient(problem: Problem, inputs: Tensor, targets: Tensor) -> Tensor:
    """∇ₓℓₙ of each example's own loss, shaped like ``inputs``."""
    leaf = inputs.detach().requires_grad_()
    fixed = [p.detach() for p in problem.leaves()]
    (gradient,) = torch.autograd.grad(problem.loss(fixed, leaf, targets), leaf)
    return gradient * inputs.shape[0]


def _one_tensor(inputs: object) -> Tensor:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise ValueError("measures in the inputs need batches whose inputs are one floating-point tensor")
    return inputs


@register("input_sharpness", UNCHANGED)
def input_sharpness(study: Study) -> Outcome:
    """The mean over examples of ‖∇ₓℓ‖₂ (Novak et al. 2018 for the Jacobian's norm), per unit of the inputs.

    It depends on the function alone, so no reparametrisation changes it. The error is a standard error over
    examples.
    """
    study.problem.mean.require_alike("input_sharpness")
    norms: list[Tensor] = []
    with study.problem.untouched(), torch.enable_grad():
        for inputs, targets, _ in study.problem.data():
            norms.append(input_gradient(study.problem, _one_tensor(inputs), targets).flatten(1).norm(dim=1))
    values = torch.cat(norms).double()
    sums = study.problem.reduced(torch.stack([values.sum(), values.square().sum()]))
    count = study.problem.examples
    mean = float(sums[0]) / count
    variance = max(float(sums[1]) / count - mean**2, 0.0)
    return Outcome(mean, math.sqrt(variance / max(count - 1, 1)), 0, {"gradients": 1})


def _accuracy_under(study: Study, steps: int, step: float | None, random_start: bool) -> Outcome:
    problem, epsilon = study.problem, study.settings.epsilon
    require(0 < epsilon <= 1, "epsilon", epsilon, "a number above 0 and at most 1, in the unit of the images")
    problem.require_one_output("accuracy")
    require(steps >= 1, "pgd_steps", steps, "a whole number of at least 1")

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        return input_gradient(problem, images, labels)

    def outputs(images: Tensor) -> Tensor:
        found = problem.outputs(problem.leaves(), images)
        require(found.ndim == 2, "the shape of the outputs", tuple(found.shape), "(examples, classes)")
        return found

    attack = EvaluationAttack(epsilon, steps, step=step, random_start=random_start, gradient=gradient)
    right = count = seen = 0
    with problem.untouched(), torch.enable_grad():
        for inputs, targets, _ in problem.data():
            low, high = float(_one_tensor(inputs).min()), float(inputs.max())
            require(low >= 0 and high <= 1, "the images' range", (low, high), "within [0, 1]")
            require(targets.ndim == 1, "targets", tuple(targets.shape), "class labels")
            places = torch.arange(seen, seen + len(inputs), device=inputs.device)
            batch = Batch(inputs, targets, torch.zeros_like(places), places, 1.0)
            right += int(right_under_attack(attack, problem.model, batch, problem.criterion, outputs))
            seen += len(inputs)
            count += int(labels_that_count(problem.criterion, targets).sum())
    sums = problem.reduced(
        torch.tensor([float(right), float(count)], dtype=torch.float64, device="cpu")
    ).tolist()
    share = sums[0] / sums[1]
    error = float(np.sqrt(share * (1 - share) / sums[1]))
    conditions = {"epsilon": epsilon, "step": attack.step, "steps": steps, "random_start": random_start}
    return Outcome(100 * share, 100 * error, 0, conditions | {"gradients": steps})


@register("fgsm_accuracy", UNCHANGED)
def fgsm_accuracy(study: Study) -> Outcome:
    """Accuracy in percent on x + ε·sign ∇ₓℓ (Goodfellow et al. 2015); images in [0, 1]; no random start.

    It depends on the function alone. The error is a standard error over examples.
    """
    return _accuracy_under(study, 1, study.settings.epsilon, random_start=False)


@register("pgd_accuracy", UNCHANGED)
def pgd_accuracy(study: Study) -> Outcome:
    """Accuracy in percent under PGD from a random start, ``pgd_steps`` steps of 2.5·ε/steps (Madry et al. 2018).

    The same attack as for a run's ``pgd_accuracy``.

    It depends on the function alone. The error is a standard error over examples.
    """
    return _accuracy_under(study, study.settings.pgd_steps, None, random_start=True)
