"""Convolution and evaluation-mode batch norm with cheap second derivatives.

A Hessian product differentiates the backward pass. PyTorch's second derivative of a convolution uses the whole image
as a kernel, and that of batch norm uses the formula for batch statistics even when the statistics are constants. Here
a convolution's second derivative is expressed as four convolutions, and evaluation-mode batch norm as an affine map.
A product needs the backward pass's graph but not the gradient's values, so those of convolutions' weights are not
even computed, which saves a ninth of a streamed product.
On a ResNet-20 with 250 images and one thread a product on a kept graph fell from 2.8 to 2.1 gradients;
``torch.func.linearize`` of the gradient, the other way to reuse a graph, took 3.2 and a tracing of 8 products.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from conadv_lab.sharpness.operators.cures import CURES

ATEN = torch.ops.aten
CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
Options = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def _forward(x: Tensor, w: Tensor, o: Options) -> Tensor:
    return ATEN.convolution(x, w, None, *o[:3], False, [0] * len(o[1]), o[3])


def _backward(g: Tensor, x: Tensor, w: Tensor, o: Options, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
    """The derivatives of ⟨g, x ∗ w⟩ in x and in w; one that is not wanted is ``None``."""
    made = ATEN.convolution_backward(g, x, w, None, *o[:3], False, [0] * len(o[1]), o[3], [*wanted, False])
    return made[0], made[1]


class _Convolution(Function):
    """y = x ∗ w, with a backward pass that can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, options: Options, linear: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.linear = options, linear
        ctx.set_materialize_grads(False)
        return _forward(x, w, options)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if not torch.is_grad_enabled():  # the second backward pass: now the values are needed
            return (*_backward(g, x, w, ctx.options, wanted), None, None)
        if ctx.linear:
            x, w = x.detach(), w.detach()
        return (*_ConvolutionBackward.apply(g, x, w, ctx.options, wanted), None, None)


class _ConvolutionBackward(Function):
    """(g, x, w) ↦ the derivatives of ⟨g, x ∗ w⟩ in x and in w, both linear in each argument.

    The derivative in w is returned as zeros of its shape: only its graph is used, never its values. The
    derivative of ⟨a, ∂ₓ⟩ + ⟨b, ∂_w⟩ is a ∗ w + x ∗ b in g, that of ⟨g, x ∗ b⟩ in x, that of
    ⟨g, a ∗ w⟩ in w.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: Options, wanted: tuple[bool, bool]
    ) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        ctx.set_materialize_grads(False)
        in_x = _backward(g, x, w, options, (True, False))[0] if wanted[0] else None
        return in_x, torch.zeros_like(w) if wanted[1] else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> Any:
        (g, x, w), o = ctx.saved_tensors, ctx.options
        in_g = in_x = in_w = None
        if b is not None:
            in_g = _forward(x, b, o)
            if ctx.needs_input_grad[1]:
                in_x = _backward(g, x, b, o, (True, False))[0]
        if a is not None:
            along = _forward(a, w, o)
            in_g = along if in_g is None else in_g.add_(along)
            if ctx.needs_input_grad[2]:
                in_w = _backward(g, a, w, o, (False, True))[1]
        return in_g, in_x, in_w, None, None


class CheapTwice(TorchFunctionMode):
    """Context in which the model's convolutions and evaluation-mode batch norms have cheap second derivatives.

    The operations of :mod:`~conadv_lab.sharpness.operators.cures` have correct ones.

    Values and second derivatives are unchanged up to rounding. In a backward pass with ``create_graph=True`` the
    derivatives in convolutions' weights are **zeros** with the correct graph. Cases not known to be safe (half
    precision, autocast, padding given as a string, an image without batch axis) are left to PyTorch.

    Args:
        linear: the backward pass will only be differentiated in the cotangent, as for Jacobian products; its
            derivatives in inputs and weights are then skipped.
        cheap: whether to replace convolutions; not possible if the forward pass itself takes gradients, whose values
            are needed. Within ``torch.func``'s transforms they are never replaced.
    """

    def __init__(self, linear: bool = False, cheap: bool = True) -> None:
        super().__init__()
        self.linear, self.cheap = linear, cheap

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = None
        if func in CONVOLUTIONS and self.cheap and torch._C._functorch.maybe_current_level() is None:
            result = _convolution(self.linear, CONVOLUTIONS[func], *args, **kwargs)
        elif func is F.batch_norm:
            result = _batch_norm(*args, **kwargs)
        elif func in CURES:
            return CURES[func](*args, **kwargs)
        return func(*args, **kwargs) if result is None else result


def _safe(*tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_autocast_enabled(present[0].device.type):
        return False
    kinds = {tensor.dtype for tensor in present}
    return kinds in ({torch.float32}, {torch.float64}) and torch.is_grad_enabled()


def _convolution(
    linear: bool, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    # For a computed weight, such as with weight norm, the first derivative's values enter the second one.
    if not weight.is_leaf:
        return None
    if isinstance(padding, str) or input.ndim != axes + 2 or not _safe(input, weight, bias):
        return None
    options: Options = (_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    result = _Convolution.apply(input, weight, options, linear)
    return result if bias is None else result + bias.view(-1, *[1] * axes)


def _each(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else [*value] * (axes // len(value))


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    if training or running_mean is None or running_var is None:
        return None
    if not _safe(input, running_mean, running_var, weight, bias):
        return None
    scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1, *[1] * (input.ndim - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))
