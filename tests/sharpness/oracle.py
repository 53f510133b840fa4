"""Hessians that share no code with autograd's second derivatives: differences of float64 gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STEP = 1e-5


def gradient_of(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([real(g.to_dense() if g.is_sparse else g).reshape(-1) for g in grads])


def real(tensor: Tensor) -> Tensor:
    """Real and imaginary part of complex numbers in a last dimension of its own; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def difference_hessian(
    model: nn.Module, criterion: Callable[..., Tensor], inputs: Any, targets: Any
) -> Tensor:
    """The Hessian of the loss of one batch, by central differences of gradients; inputs in float64.

    Of complex weights it is the one in their real and imaginary parts, each pair side by side.
    """
    model.double().eval()  # not a copy: the old weight norm cannot be copied
    parameters = [p for p in model.parameters() if p.requires_grad]
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    def loss() -> Tensor:
        return criterion(model(*(a.clone() for a in arguments)), targets)

    columns = []
    for parameter in parameters:
        flat = real(parameter.data).view(-1)
        for i in range(flat.numel()):
            middle, found = float(flat[i]), []
            for place in (middle - STEP, middle + STEP):
                flat[i] = place
                found.append(gradient_of(loss, parameters))
            flat[i] = middle
            columns.append((found[1] - found[0]) / (2 * STEP))
    return torch.stack(columns, 1)
