"""Checks that parameters without a gradient really have no effect, by perturbing them."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conadv_lab.sharpness.problem.structure import topological

if TYPE_CHECKING:
    from conadv_lab.sharpness.problem.problem import Problem

WAYS = (
    "reentrant checkpointing (pass use_reentrant=False), torch.inference_mode, torch.no_grad, .detach(), .data "
    "and autograd.grad without create_graph=True cause this"
)
SHOWN = 5


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (" …" if len(names) > SHOWN else "")


def hidden(problem: "Problem", names: Sequence[str]) -> list[str]:
    """Which of these parameters change the loss when perturbed; at most six are reported.

    Costs one forward pass over the data for each, after three for all of them together.
    """
    mine = copy.copy(problem)
    mine.all_reduce = False  # parameters without a gradient may differ between ranks
    base = mine.value()
    noise = abs(mine.value() - base) + 4 * problem.roundoff * abs(base)

    def moves(some: Sequence[str]) -> bool:
        vector, slices = mine.weights(), mine.slices()
        for name in some:
            part = vector[slices[name]]
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(len(part), generator=generator, dtype=part.dtype, device="cpu").to(part.device)
            part += 0.1 * (1 + part.abs().mean()) * z
        return not abs(mine.value(vector) - base) <= 10 * noise

    if not moves(names):
        return []
    found: list[str] = []
    for name in names:
        if len(found) <= SHOWN and moves([name]):
            found.append(name)
    return found or list(names)


def reentrant(error: RuntimeError) -> ValueError | None:
    """The error for gradients through reentrant checkpointing, which PyTorch refuses."""
    if "use_reentrant" not in str(error):
        return None
    return ValueError(
        "the model uses reentrant checkpointing, which does not support autograd.grad; pass "
        "use_reentrant=False to torch.utils.checkpoint"
    )


def bypassed(loss: Tensor, model: nn.Module) -> str | None:
    """A parameter of the original model that the loss depends on directly, although the model ran with copies.

    A criterion with a penalty on ``model.parameters()`` does that: the penalty would count as constant.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    nodes = topological(loss.grad_fn) if loss.grad_fn is not None else []
    found = (names.get(id(getattr(node, "variable", None))) for node in nodes)
    return next((name for name in found if name is not None), None)
