"""Curvature matrices as symmetric linear maps, separate from the algorithms that use them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.operators.linear_map import Operator, Product
from conadv_lab.sharpness.operators.twice import CheapTwice
from conadv_lab.sharpness.problem.problem import Problem

LIKELIHOODS = ("categorical", "gaussian")


class Hessian(Operator):
    """H = ∇²L, the second derivative of the mean loss, by reverse-over-reverse (Pearlmutter 1994, eq. 3).

    Reparametrising the network changes it (Dinh et al. 2017): H ↦ SHS for weights scaled by S⁻¹.

    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> Hessian(Problem(model, mse_loss, (torch.eye(2), torch.zeros(2, 1)))).dense()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def _prepare(self, leaves: list[Tensor], run: Callable[[], Tensor], targets: Any) -> Product:
        output = run()
        with CheapTwice(cheap=False):  # losses also have second derivatives to fix
            loss = self.problem.criterion(output, targets)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        curved = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]

        def product(vector: list[Tensor], keep: bool) -> list[Tensor]:
            if not curved:  # a loss that is linear in these variables
                return [torch.zeros_like(leaf) for leaf in leaves]
            heads = [gradients[i] for i in curved]
            tails = [vector[i] for i in curved]
            return list(
                torch.autograd.grad(
                    heads, leaves, tails, retain_graph=keep, allow_unused=True, materialize_grads=True
                )
            )

        return product


class _OutputCurvature(Operator):
    """Jᵀ M J, with J the Jacobian of the outputs, by two backward passes and a small map M on the outputs.

    The product Jv is the derivative of u ↦ Jᵀu in direction v (the double-backward trick), so only reverse mode is
    needed and every layer with a second derivative works.
    """

    linear = True

    def _prepare(self, leaves: list[Tensor], run: Callable[[], Tensor], targets: Any) -> Product:
        output = run()
        probe = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, leaves, probe, create_graph=True, allow_unused=True)
        reached = [i for i, g in enumerate(pulled) if g is not None]
        inner = self._inner(output.detach(), targets)
        used = [leaves[i] for i in reached]

        def product(vector: list[Tensor], keep: bool) -> list[Tensor]:
            heads, tails = [pulled[i] for i in reached], [vector[i] for i in reached]
            (pushed,) = torch.autograd.grad(heads, probe, tails, retain_graph=True)
            back = torch.autograd.grad(output, used, inner(pushed), retain_graph=keep)
            full = [torch.zeros_like(leaf) for leaf in leaves]
            for i, part in zip(reached, back, strict=True):
                full[i] = part
            return full

        return product

    def _inner(self, output: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


class GGN(_OutputCurvature):
    """The generalised Gauss–Newton matrix G = E Jᵀ (∂²ℓ/∂f²) J over examples (Schraudolph 2002, sec. 3).

    Positive semi-definite when the loss is convex in the outputs; the Hessian where the model is linear.
    """

    def _inner(self, output: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        leaf = output.requires_grad_()
        with CheapTwice(cheap=False):
            loss = self.problem.criterion(leaf.clone(), targets)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)

        def inner(pushed: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(leaf)
            return torch.autograd.grad(gradient, leaf, pushed, retain_graph=True)[0]

        return inner


class Fisher(_OutputCurvature):
    """F = E_x E_{y∼p(·|x)} ∇log p ∇log pᵀ, the expectation over labels taken exactly (Martens 2020, eq. 8).

    ``likelihood="categorical"`` takes the outputs as logits with classes on axis 1, M = diag(p) − ppᵀ;
    ``"gaussian"`` takes them as means of unit variance, M = I. Label smoothing does not enter.
    """

    def __init__(self, problem: Problem, *, likelihood: str = "categorical", **options: Any) -> None:
        if likelihood not in LIKELIHOODS:
            raise unknown("likelihood", likelihood, LIKELIHOODS)
        self.likelihood = likelihood
        super().__init__(problem, **options)

    def _inner(self, output: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        self.problem.require_one_output("the Fisher matrix", rows=True)
        self.problem.mean.require_alike("the Fisher matrix", over_examples=False)
        if self.likelihood == "gaussian":
            return lambda pushed: pushed / output.shape[0]
        require(output.ndim >= 2, "outputs' shape", tuple(output.shape), "(examples, classes, …)")
        p = output.softmax(1)
        count = output.numel() // output.shape[1]
        return lambda pushed: p * (pushed - (p * pushed).sum(1, keepdim=True)) / count


class EmpiricalFisher(_OutputCurvature):
    """(1/N) Σₙ gₙgₙᵀ with the examples' own gradients gₙ at their labels (Kunstner et al. 2019, eq. 3).

    Not a curvature: at a perfect fit it vanishes, while Hessian and Fisher need not.
    """

    def _inner(self, output: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        self.problem.require_one_output("the empirical Fisher matrix", rows=True)
        self.problem.mean.require_alike("the empirical Fisher matrix")
        leaf = output.requires_grad_()
        (gradient,) = torch.autograd.grad(self.problem.criterion(leaf.clone(), targets), leaf)
        count = output.shape[0]
        residual = gradient.reshape(count, -1) * count  # of each example's own loss

        def inner(pushed: Tensor) -> Tensor:
            along = (residual * pushed.reshape(count, -1)).sum(1, keepdim=True)
            return (residual * along / count).view_as(output)

        return inner
