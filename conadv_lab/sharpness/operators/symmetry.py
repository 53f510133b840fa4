"""Checks that products come from a symmetric matrix, using products that are computed anyway.

PyTorch's second derivatives are sometimes wrong, and then mostly asymmetric. For two consecutive products, Hu and
Hv, we compare uᵀHv and vᵀHu: for the first two, and later for two in sixteen. That costs four sums over the weights and
two copies: one per cent of the products for wide layers, and far less elsewhere. A difference is checked again in
float64: if it persists, the derivative is wrong; if not, it was rounding. A second derivative that is wrong but
symmetric, such as from a backward pass that detaches, is not detected.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from conadv_lab.sharpness.operators.twice import CheapTwice
from conadv_lab.sharpness.problem.nests import copied, first_tensor, take
from conadv_lab.sharpness.problem.problem import Problem

EVERY = 16  # of this many products two are compared, so that the copies cost little even for wide layers
FADING = 0.75  # decay of earlier pairs, so that a few pairs count together
LOST = 0.05  # with relative rounding above this a result is worthless
EXAMPLES = 8


class Symmetry:
    """The difference of uᵀHv and vᵀHu over the last few pairs of products, relative to their size.

    Attributes:
        pairs: number of pairs compared.
        scale: the largest ‖Hv‖ / ‖v‖ so far; products much smaller than it are pure rounding.
        share: √(Σ(uᵀHv − vᵀHu)² / Σ((uᵀHv)² + (vᵀHu)²)), weighted towards recent pairs.
    """

    def __init__(self, roundoff: float) -> None:
        self.roundoff, self.pairs, self.noted = roundoff, 0, 0
        self._last: tuple[Tensor, Tensor, float] | None = None
        self.scale = 0.0
        self._sums = np.zeros(3)  # squares of the difference, both forms, and ‖u‖‖v‖

    def note(self, vector: Tensor, image: Tensor) -> None:
        """Record a product. Stored vectors are copied, as the caller may modify them later.

        Raises:
            ValueError: the product is not finite.
        """
        place, self.noted = self.noted % EVERY, self.noted + 1
        if place > 1:
            return
        last, numbers = self._last, [vector.norm(), image.norm()]
        if last is not None:
            numbers += [last[0] @ image, last[1] @ vector]
        mine, other, *forms = torch.stack(numbers).double().tolist()
        if not math.isfinite(mine * other):
            raise ValueError(
                "a product with the curvature matrix contains NaN or infinity: at these weights a second "
                "derivative does not exist (for example of a root or norm at 0) or overflows"
            )
        self.scale = max(self.scale, other / mine if mine else 0.0)
        if last is not None:
            first, second = forms
            terms = [(first - second) ** 2, first**2 + second**2, (mine * last[2]) ** 2]
            self._sums = FADING * self._sums + np.array(terms)
            self.pairs += 1
        self._last = (vector.clone(), image.clone(), mine) if place == 0 else None

    @property
    def share(self) -> float:
        return math.sqrt(self._sums[0] / self._sums[1]) if self._sums[1] else 0.0

    @property
    def plausible(self) -> bool:
        """Whether the difference may be rounding, of the forms or of products as large as the largest so far."""
        difference, forms, sizes = self._sums
        floor = min(100 * self.roundoff, 0.01)
        return bool(difference <= self.roundoff / 16 * forms + (floor * self.scale) ** 2 * sizes)


def judge(operator: Any) -> None:
    """Handle a difference that does not look like rounding: check new vectors in float64.

    Raises:
        ValueError: the matrix is asymmetric there too, or rounding makes results worthless.
    """
    problem, checked = operator.problem, operator.symmetry
    twin = _in_float64(operator)
    try:
        generator = torch.Generator().manual_seed(problem.seed)
        for _ in range(2):
            vector = torch.randn(twin.size, generator=generator, dtype=torch.float64, device="cpu")
            twin @ vector.to(twin.device)
    except (RuntimeError, TypeError) as error:  # a model that does not run in float64
        raise ValueError(_told(operator, checked.share, None)) from error
    if not twin.symmetry.plausible:
        raise ValueError(_told(operator, twin.symmetry.share, suspect(problem)))
    checked.scale = max(checked.scale, twin.symmetry.scale)
    if not checked.plausible and checked.share > LOST:
        raise ValueError(
            f"products with the {type(operator).__name__} are lost in rounding: uᵀHv and vᵀHu differ by "
            f"{checked.share:.2g} of their size in {problem.arithmetic}; use dtype=torch.float64"
        )


def _told(operator: Any, share: float, name: str | None) -> str:
    what = f"suspect: {name}" if name else "no single module reproduces it"
    return (
        f"the {type(operator).__name__} is not symmetric (uᵀHv and vᵀHu differ by {share:.2g} of their size), so "
        f"PyTorch's second derivative of this model is wrong; {what}; replace it, or choose measures without a "
        "Hessian, such as sam_worst"
    )


def _in_float64(operator: Any) -> Any:
    """The same operator in float64 on a few examples."""
    twin, problem = copy.copy(operator), copy.copy(operator.problem)
    with problem.untouched():
        inputs, targets, _ = next(problem.data())
    part = slice(0, min(EXAMPLES, first_tensor(inputs).shape[0]))
    problem.use([(take(inputs, part), take(targets, part))])
    problem.cast(torch.float64)
    twin.problem, twin.dtype, twin.memory_budget, twin._kept = problem, torch.float64, 0, None
    twin.symmetry, twin._judged = Symmetry(problem.roundoff), True
    twin.size = problem.size if twin.wrt == "parameters" else twin._input_size()
    return twin


def suspect(problem: Problem) -> str | None:
    """The innermost module whose own second derivative is not symmetric, as ``'name' (type)``."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            calls.append((name, module, copied(args), copied(kwargs)))

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in problem.model.named_modules()
        if name
    ]
    try:
        with problem.untouched(), torch.enable_grad():
            inputs, _, _ = next(problem.data())
            problem.outputs(problem.leaves(), take(inputs, slice(0, EXAMPLES)))
            for handle in handles:
                handle.remove()
            for name, module, args, kwargs in calls:
                if not _symmetric_alone(problem.state_of(name), module, args, kwargs):
                    return f"{name!r} ({type(module).__name__})"
    finally:
        for handle in handles:
            handle.remove()
    return None


def _symmetric_alone(state: dict[str, Tensor], module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a curved function of one module's outputs has a symmetric Hessian in its inputs and weights."""

    def leaf(data: Any) -> Any:
        if isinstance(data, Tensor) and data.is_floating_point():
            return data.detach().double().requires_grad_()
        return data

    args, kwargs, state = (tree_map(leaf, part) for part in (args, kwargs, state))
    variables = [part for part in tree_leaves((args, kwargs, state)) if isinstance(part, Tensor)]
    variables = [part for part in variables if part.requires_grad]
    try:
        with CheapTwice():
            outputs = tree_leaves(torch.func.functional_call(module, state, copied(args), copied(kwargs)))
        heads = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        curved = torch.stack([_mixed(head).tanh().sum().double() for head in heads]).sum()
        slopes = torch.autograd.grad(
            curved, variables, create_graph=True, allow_unused=True, materialize_grads=True
        )
        pairs = [(g, v) for g, v in zip(slopes, variables, strict=True) if g.requires_grad]
        checked = Symmetry(torch.finfo(torch.float64).eps)
        for vector in _vectors([v for _, v in pairs]):
            images = torch.autograd.grad(
                [g for g, _ in pairs], [v for _, v in pairs], vector, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            checked.note(_flat(vector), _flat(images))
    except (RuntimeError, TypeError):
        return True  # it has no second derivative, or does not run in float64
    return checked.plausible


def _mixed(head: Tensor) -> Tensor:
    places = torch.arange(head.numel(), dtype=head.dtype, device=head.device).view(head.shape)
    return head * (places + 0.5).cos()


def _vectors(variables: list[Tensor]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield [
            torch.randn(v.shape, generator=generator, dtype=v.dtype, device="cpu").to(v.device)
            for v in variables
        ]


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
