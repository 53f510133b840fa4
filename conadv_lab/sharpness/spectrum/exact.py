"""Exact traces from per-example derivatives, layer by layer, without an estimator.

tr(G) = (1/N) Σₙ Σ_c μ_nc ‖Jₙᵀ q_nc‖², where μ, q are the eigenpairs of the loss's second derivative in the
outputs of example n (Schraudolph 2002 for G; for cross-entropy μ_c, q_c span diag(p) − ppᵀ). The norms are
summed per layer from its input and the derivative at its output, as in Goodfellow (2015), "Efficient
per-example gradient computations".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from conadv_lab.sharpness.operators.cures import second_derivatives
from conadv_lab.sharpness.operators.twice import CheapTwice
from conadv_lab.sharpness.problem.groups import share_of
from conadv_lab.sharpness.problem.nests import first_tensor, take
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.problem.structure import curved_because

MAX_OUTPUTS = 1000
CHUNK = 64
BATCH_NORM = "batch norm in train mode couples the examples of a batch"

COUPLED = "the loss of a batch is not a mean of its parts' losses"


@dataclass(frozen=True)
class ExactTrace:
    """An exact trace, or the reasons why there is none.

    Attributes:
        value: the trace; ``None`` if refused.
        by_parameter: each parameter's share, by name.
        refusals: the reasons, in words; empty if there is a value.
        gradients: the cost, in gradients over the data set (a forward pass counts as a third): one forward pass and,
            for each output direction, one backward pass to the layers' outputs and one for the weights.
    """

    value: float | None
    by_parameter: dict[str, float]
    refusals: tuple[str, ...]
    gradients: float


@dataclass
class _Use:
    """One call of a layer's function with a chosen weight, and what its per-example derivatives need."""

    function: str
    input: Tensor
    edge: GradientEdge  # where its output's gradient arrives; the output itself may be overwritten later, as by relu_
    names: dict[str, str]  # "weight" or "bias" → the parameter's name
    options: dict[str, Any]


class _Recorder(TorchFunctionMode):
    """Records each call that uses a chosen weight, without hooks on the model."""

    def __init__(self, leaves: Sequence[Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.leaves = {id(leaf): name for leaf, name in zip(leaves, names, strict=True)}
        self.uses: list[_Use] = []
        self.refusals: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        mine = [self.leaves[id(a)] for a in tree_leaves((args, kwargs)) if id(a) in self.leaves]
        if mine and any(isinstance(part, Tensor) for part in tree_leaves(result)):
            known = isinstance(result, Tensor) and result.requires_grad
            use = self._understood(func, args, kwargs, result) if known else None
            if use is None or sorted(use.names.values()) != sorted(mine):
                name = getattr(func, "__name__", str(func))
                self.refusals.append(
                    f"parameter {mine[0]!r} is used by {name}, whose per-example norms are not implemented"
                )
            else:
                self.uses.append(use)
        return result

    def _understood(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> _Use | None:
        for function, keys in _SIGNATURES.items():
            if func is function:
                bound = dict(zip(keys, args, strict=False)) | kwargs
                names = {
                    role: self.leaves[id(bound[role])]
                    for role in ("weight", "bias")
                    if id(bound.get(role)) in self.leaves
                }
                options = {k: v for k, v in bound.items() if k not in ("input", "weight", "bias")}
                if options.get("training") or isinstance(options.get("padding"), str):
                    return None
                if bound.get("weight") is not None:
                    options["weight_shape"] = bound["weight"].shape
                return _Use(keys[-1], bound["input"].detach(), get_gradient_edge(output), names, options)
        return None


_SIGNATURES: dict[Any, tuple[str, ...]] = {
    torch._C._nn.linear: ("input", "weight", "bias", "linear"),
    F.linear: ("input", "weight", "bias", "linear"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups", "conv2d"),
    F.batch_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "batch_norm",
    ),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps", "layer_norm"),
}  # fmt: skip


def _norms_linear(use: _Use) -> dict[str, Callable[[Tensor], Tensor]]:
    count = use.input.shape[0]
    x = use.input.reshape(count, -1, use.input.shape[-1])

    def weight(g: Tensor) -> Tensor:
        g = g.reshape(count, -1, g.shape[-1])
        if x.shape[1] == 1:
            return x.square().sum((1, 2)) * g.square().sum((1, 2))
        return torch.bmm(g.transpose(1, 2), x).square().sum((1, 2))

    return {"weight": weight, "bias": lambda g: g.reshape(count, -1, g.shape[-1]).sum(1).square().sum(1)}


def _norms_conv2d(use: _Use) -> dict[str, Callable[[Tensor], Tensor]]:
    options, shape = use.options, use.options["weight_shape"]
    groups = options.get("groups", 1)
    kernel = tuple(shape[2:])
    unfolded = F.unfold(
        use.input, kernel, options.get("dilation", 1), options.get("padding", 0), options.get("stride", 1)
    )
    count, places = unfolded.shape[0], unfolded.shape[2]
    x = unfolded.view(count * groups, -1, places).transpose(1, 2)

    def weight(g: Tensor) -> Tensor:
        g = g.reshape(count * groups, -1, places)
        return torch.bmm(g, x).square().sum((1, 2)).view(count, groups).sum(1)

    return {"weight": weight, "bias": lambda g: g.sum((2, 3)).square().sum(1)}


def _per_channel(normalised: Tensor, axes: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    def total(g: Tensor) -> Tensor:
        return (g.sum(axes) if axes else g).square().flatten(1).sum(1)

    return {"weight": lambda g: total(g * normalised), "bias": total}


def _norms_batch_norm(use: _Use) -> dict[str, Callable[[Tensor], Tensor]]:
    shape = [1, -1] + [1] * (use.input.ndim - 2)
    o = use.options
    scale = torch.rsqrt(o["running_var"] + o.get("eps", 1e-5)).view(shape)
    return _per_channel((use.input - o["running_mean"].view(shape)) * scale, tuple(range(2, use.input.ndim)))


def _norms_layer_norm(use: _Use) -> dict[str, Callable[[Tensor], Tensor]]:
    shape = use.options["normalized_shape"]
    inner = use.input.ndim - len(tuple(shape))
    return _per_channel(
        F.layer_norm(use.input, shape, eps=use.options.get("eps", 1e-5)), tuple(range(1, inner))
    )


_NORMS = {
    "linear": _norms_linear,
    "conv2d": _norms_conv2d,
    "batch_norm": _norms_batch_norm,
    "layer_norm": _norms_layer_norm,
}


def output_curvature(problem: Problem, output: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m, C) and eigenvectors (m, C, C, in columns) of each example's ∂²ℓ/∂f² over its C outputs."""
    leaf = output.detach().requires_grad_()
    with CheapTwice(cheap=False):
        loss = problem.criterion(leaf.clone(), targets)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    count = leaf.shape[0]
    flat = gradient.reshape(count, -1)
    if not gradient.requires_grad:
        return torch.zeros_like(flat), torch.eye(flat.shape[1], dtype=leaf.dtype, device=leaf.device).expand(
            count, -1, -1
        )
    columns = [
        torch.autograd.grad(flat[:, c].sum(), leaf, retain_graph=True)[0].reshape(count, -1)
        for c in range(flat.shape[1])
    ]
    matrix = torch.stack(columns, 2).double() * count
    values, vectors = torch.linalg.eigh((matrix + matrix.transpose(1, 2)) / 2)
    return values.to(leaf.dtype), vectors.to(leaf.dtype)


@second_derivatives()
def exact_trace(problem: Problem, *, matrix: str = "hessian") -> ExactTrace:
    """The exact trace of the Gauss–Newton matrix, or of the Hessian if the graph proves them equal.

    Args:
        matrix: ``"ggn"`` or ``"hessian"``; the Hessian is refused unless the outputs are piecewise linear in
            every single chosen weight (see :mod:`~conadv_lab.sharpness.problem.structure`).

    >>> x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
    >>> from conadv_lab.sharpness.operators.matrices import Hessian
    >>> problem = Problem(net, F.cross_entropy, (x, y))
    >>> abs(exact_trace(problem).value - float(Hessian(problem).dense().trace())) < 1e-12
    True
    """
    if problem.bn == "train" and any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in problem.model.modules()
    ):
        return ExactTrace(None, {}, (BATCH_NORM,), 0.0)
    if not problem.mean.of_parts:
        return ExactTrace(None, {}, (COUPLED,), 0.0)
    totals = torch.zeros(len(problem.names), dtype=torch.float64, device=problem.device)
    directions = 0.0
    with problem.untouched(), torch.enable_grad():
        for index, (inputs, targets, share) in enumerate(problem.data()):
            size = first_tensor(inputs).shape[0]
            if index == 0 and (hidden := _hidden(problem, take(inputs, slice(0, 1)))):
                return ExactTrace(None, {}, (hidden,), 0.0)
            for start in range(0, size, CHUNK):
                part = slice(start, min(start + CHUNK, size))
                weight = share_of(problem, inputs, targets, part, share)
                if not weight:
                    continue
                refused, shares, count = _chunk(problem, take(inputs, part), take(targets, part), matrix)
                if refused:
                    return ExactTrace(None, {}, tuple(dict.fromkeys(refused)), 0.0)
                totals += weight * shares
                directions += weight * count
    totals = problem.reduced(totals)
    by_parameter = dict(zip(problem.names, totals.tolist(), strict=True))
    return ExactTrace(float(totals.sum()), by_parameter, (), (1 + 2 * directions) / 3)


def _hidden(problem: Problem, one: Any) -> str:
    """Why the recorded calls miss part of one example's derivative, tested on a random one; empty if they do not.

    A weight may be used in ways that are not recorded: gradients taken within the forward pass, functions with a
    custom backward, TorchScript.
    """
    leaves = problem.leaves()
    recorder = _Recorder(leaves, problem.names)
    try:
        with recorder:
            output = problem.outputs(leaves, one)
    except (RuntimeError, ValueError, IndexError):
        return "the forward pass fails on a single example"
    used = [name for use in recorder.uses for name in use.names.values()]
    if recorder.refusals or len(set(used)) < len(used) or not recorder.uses:
        return ""  # refused with a better message when iterating over the examples
    if output.shape[0] != 1:
        return f"the first axis of the outputs, {tuple(output.shape)} for one example, does not index the examples"
    probe = (
        torch.arange(output.numel(), dtype=output.dtype, device=output.device).view_as(output).add(0.5).cos()
    )
    whole = torch.autograd.grad(
        output, leaves, probe, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    edges = [use.edge for use in recorder.uses]
    at = torch.autograd.grad(output, edges, probe, retain_graph=True, allow_unused=True)
    shown = dict.fromkeys(problem.names, 0.0)
    for use, gradient in zip(recorder.uses, at, strict=True):
        if gradient is None:
            continue
        norm = _NORMS[use.function](use)
        for role, name in use.names.items():
            shown[name] += float(norm[role](gradient.to(use.input.dtype)).double().sum())
    tolerance = 1e-6 if problem.precision == torch.float64 else 1e-2
    scale = max(float(g.double().square().sum()) for g in whole)
    for name, gradient in zip(problem.names, whole, strict=True):
        true = float(gradient.double().square().sum())
        if abs(true - shown[name]) > tolerance * max(true, 1e-4 * scale):
            return f"parameter {name!r} is used in a way that recording the forward pass does not show"
    return ""


def _chunk(problem: Problem, inputs: Any, targets: Any, matrix: str) -> tuple[list[str], Tensor, int]:
    """Refusals, each parameter's mean squared norms, and the number of output directions."""
    leaves = problem.leaves()
    recorder = _Recorder(leaves, problem.names)
    with recorder:
        output = problem.outputs(leaves, inputs)
    nothing = torch.zeros(len(leaves), dtype=torch.float64, device=output.device)
    refusals = list(recorder.refusals)
    used = [name for use in recorder.uses for name in use.names.values()]
    refusals += [f"weight {n!r} is tied or reused" for n in dict.fromkeys(used) if used.count(n) > 1]
    if matrix == "hessian":
        refusals = curved_because(output, leaves, problem.names) + refusals
    if output.shape[1:].numel() > MAX_OUTPUTS:
        refusals.append(
            f"{output.shape[1:].numel()} outputs per example are too many (at most {MAX_OUTPUTS})"
        )
    if refusals:
        return refusals, nothing, 0
    values, vectors = output_curvature(problem, output, targets)
    norms = [_NORMS[use.function](use) for use in recorder.uses]
    edges = [use.edge for use in recorder.uses]
    place = {name: i for i, name in enumerate(problem.names)}
    largest = values.abs().max()
    kept = [c for c in range(values.shape[1]) if values[:, c].abs().max() > 1e-14 * largest]
    for c in kept:
        gradients = torch.autograd.grad(output, edges, vectors[:, :, c].view_as(output), retain_graph=True)
        for use, norm, gradient in zip(recorder.uses, norms, gradients, strict=True):
            gradient = gradient.to(use.input.dtype)  # the autocast dtype, if the model enabled it
            for role, name in use.names.items():
                nothing[place[name]] += (values[:, c] * norm[role](gradient)).double().mean()
    return [], nothing, len(kept)
