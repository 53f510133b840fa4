"""Moves a model's weights for a pass, restores them, and provides the gradients computed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab.methods.alone import Gradients
from conadv_lab.methods.base import Losses
from conadv_lab.optim.lars import LARS


@dataclass(frozen=True)
class Move:
    """w + scale · direction for every weight w: ``direction`` has one tensor per weight, ``scale`` is 0-d."""

    direction: list[Tensor]
    scale: Tensor


class Weights:
    """The trainable weights of a model, with memory for a copy.

    They are restored from the copy, bit for bit. Subtracting what was added needs no memory but is not exact: of
    ResNet-18's initial weights in float32, moved by 0.05 along a random direction, 0.2 % come back with other bits, as
    a test counts, and the error would grow with every step.

    Args:
        model: weights without ``requires_grad`` are not moved.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        with torch.no_grad():
            self.kept = self.zeros()

    def zeros(self) -> list[Tensor]:
        """A tensor of zeros for each weight."""
        return [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @cached_property
    def room(self) -> list[Tensor]:
        """Reusable memory for a direction: on a CPU, allocating it takes longer than computing it."""
        with torch.no_grad():
            return self.zeros()

    @contextmanager
    def moved(self, move: Move) -> Iterator[None]:
        """Passes inside run at the moved weights; afterwards the weights are restored bitwise."""
        with torch.no_grad():
            torch._foreach_copy_(self.kept, self.parameters)
            scales = [move.scale.to(p.device, p.dtype) for p in self.parameters]
            torch._foreach_addcmul_(self.parameters, move.direction, scales)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.kept)

    def taken(self) -> list[Tensor | None]:
        """Take the gradients from ``.grad``, which is then None."""
        found = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return found

    @torch.no_grad()
    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to ``.grad``."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def gradients(self) -> list[Tensor]:
        """The gradients in ``.grad``."""
        return [p.grad for p in self.parameters if p.grad is not None]


Run = Callable[[bool], Losses]
"""(counted) adds the gradient of a loss to ``.grad`` and returns this process's share of the step's mean losses;
``counted`` says whether its forward passes update batch norm's running statistics."""


class Part:
    """The unit for which the weights move once: a whole step, or one of its micro-batches.

    Args:
        weights: of the model.
        run: the part's pass.
        gradients: access to other ranks' gradients.
        is_whole: whether the weights move along a gradient that is summed over ranks.
        is_one_of_many: whether its step may have other parts.
        kept: gradients kept from earlier steps, oldest first, each with one tensor per weight.
        number: the part's number within its step, over all ranks.
    """

    def __init__(
        self,
        weights: Weights,
        run: Run,
        gradients: Gradients,
        is_whole: bool,
        kept: list[list[Tensor]],
        number: int = 0,
        is_one_of_many: bool = False,
    ) -> None:
        self.weights, self.run, self.gradients, self.is_whole = weights, run, gradients, is_whole
        self.kept, self.number, self.is_one_of_many = kept, number, is_one_of_many
        self._present: list[bool] = []

    def here(self, counted: bool, run: Run | None = None) -> tuple[Losses, list[Tensor]]:
        """(losses, gradient) of a pass at the current weights: one tensor per weight; ``.grad`` is unchanged.

        Args:
            counted: whether it updates running statistics.
            run: use this pass instead of the part's own.
        """
        before = self.weights.taken()
        with self.gradients.summed() if self.is_whole else self.gradients.aside():
            losses = (run or self.run)(counted)
        found = self.weights.taken()
        self.weights.give(before)
        self._present = [gradient is not None for gradient in found]
        pairs = zip(found, self.weights.parameters, strict=True)
        return losses, [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def at(self, move: Move, counted: bool, run: Run | None = None) -> tuple[Losses, list[Tensor]]:
        """Like `here`, at the moved weights, which are restored."""
        with self.weights.moved(move):
            return self.here(counted, run)

    def give(self, gradient: list[Tensor]) -> None:
        """Add the latest pass's gradient to the step's gradient."""
        if self.is_whole:
            self.gradients.is_complete()
        if self.is_one_of_many:  # what is added later does not belong to this part
            gradient = [one.clone() for one in gradient]
        shown = zip(gradient, self._present, strict=True)
        self.weights.give([one if present else None for one, present in shown])


@torch.no_grad()
def shift(kept: Sequence[list[Tensor]], gradient: list[Tensor]) -> None:
    """Append a gradient to those kept and drop the oldest."""
    for older, newer in zip(kept, [*kept[1:], gradient], strict=True):
        torch._foreach_copy_(older, newer)


@torch.no_grad()
def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all of them as one vector, 0-d."""
    norms = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack([one.to(norms[0]) for one in norms]))


@torch.no_grad()
def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product of two vectors given as lists of tensors, 0-d."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


@torch.no_grad()
def ratio(above: Tensor | float, below: Tensor) -> Tensor:
    """above / below, or 0 if ``below`` is 0: nothing moves along a zero gradient."""
    return torch.where(below == 0, 0.0, above / below)


def along(direction: list[Tensor], radius: float) -> Move:
    """radius · direction / ‖direction‖, the norm over all weights of the model.

    >>> move = along([torch.tensor([3.0]), torch.tensor([4.0])], radius=0.5)
    >>> [(move.scale * part).tolist() for part in move.direction]
    [[0.3...], [0.4...]]
    """
    return Move(direction, ratio(radius, norm(direction)))


@torch.no_grad()
def length(move: Move) -> Tensor:
    """‖w̃ − w‖, 0-d."""
    return norm(move.direction) * move.scale.abs()


def groups(optimizer: Optimizer, weights: Weights) -> list[dict[str, Any]]:
    """The optimizer's parameter group of each weight.

    Raises:
        ValueError: the optimizer lacks a weight.
    """
    homes = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in zip(weights.names, weights.parameters, strict=True):
        if parameter not in homes:
            raise ValueError(f"the optimizer lacks {name}; allowed: one with all trainable weights")
    return [homes[p] for p in weights.parameters]


BUFFERS = ("momentum_buffer", "velocity", "mean", "exp_avg")
"""Names of the momentum in torch's SGD, this package's LARS and LAMB, and torch's Adam."""


def momenta(optimizer: Optimizer, weights: Weights) -> list[Tensor]:
    """The optimizer's momentum of each weight, not to be modified; zeros if it has none yet."""

    def found(parameter: Tensor) -> Tensor:
        state = optimizer.state.get(parameter, {})
        buffers = (state.get(name) for name in BUFFERS)
        there = next((one for one in buffers if one is not None), None)
        return torch.zeros_like(parameter) if there is None else there

    with torch.no_grad():
        return [found(p) for p in weights.parameters]


def decays_in_gradient(optimizer: Optimizer) -> bool:
    """Whether the optimizer adds λ w to the gradient, as SGD and LARS do, instead of to its step."""
    return isinstance(optimizer, (torch.optim.SGD, LARS))


@torch.no_grad()
def rates(optimizer: Optimizer, weights: Weights, gradient: list[Tensor]) -> list[Any]:
    """The length of a step without momentum over the gradient's length, for each weight.

    That is the learning rate, under LARS times the trust ratio η‖w‖ / (‖g‖ + d‖w‖ + eps), which is 1 if a norm is 0.
    """
    found: list[Any] = []
    for parameter, one, group in zip(weights.parameters, gradient, groups(optimizer, weights), strict=True):
        rate = group["lr"]
        if isinstance(optimizer, LARS) and group["adapt"]:
            length, steep = parameter.norm(), one.norm()
            trust = group["trust_coefficient"] * length
            trust = trust / (steep + group["weight_decay"] * length + group["eps"])
            if group["variant"] == "C":
                trust = trust.clamp(max=group["clamp"])
            rate = rate * torch.where((length > 0) & (steep > 0), trust, 1.0)
        found.append(rate)
    return found


@torch.no_grad()
def step_of_sgd(optimizer: Optimizer, weights: Weights, gradient: list[Tensor]) -> Move:
    """Where torch's SGD would go with this gradient, momentum, Nesterov's form and decay included; in ``weights.room``.

    Raises:
        ValueError: another optimizer.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(f"the optimizer is {type(optimizer).__name__}; allowed: torch.optim.SGD")
    both = zip(weights.parameters, gradient, weights.room, groups(optimizer, weights), strict=True)
    for parameter, one, room, group in both:
        velocity = pull = torch.add(one, parameter, alpha=group["weight_decay"], out=room)
        old = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if group["momentum"] and old is not None:
            velocity = (old * group["momentum"]).add_(pull, alpha=1 - group["dampening"])
        if group["nesterov"]:
            velocity = (velocity * group["momentum"]).add_(pull)
        torch.mul(velocity, -group["lr"], out=room)
    return Move(weights.room, weights.room[0].new_ones(()))
