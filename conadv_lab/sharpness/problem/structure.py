"""Proves from a network's graph whether its outputs are piecewise linear in each single weight.

If so, ∂²f/∂w² = 0 almost everywhere for each weight w, so the Hessian's diagonal equals that of the Gauss–Newton
matrix, and its trace can be computed exactly. The proof walks autograd's recorded graph, so it works for any Python
code; operations that are not on the lists below are refused.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

LINEAR = frozenset((
    "T", "View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Permute", "Transpose", "Expand",
    "Squeeze", "Unsqueeze", "Cat", "Stack", "Split", "SplitWithSizes", "Unbind", "Slice", "Select",
    "Index", "IndexSelect", "Gather", "Mean", "Sum", "Neg", "Add", "Sub", "Rsub", "Clone", "Copy",
    "ToCopy", "Flip", "Roll", "Repeat", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D",
    "ReplicationPad2D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D",
    "Relu", "LeakyRelu", "Threshold", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Abs", "Max", "Amax",
    "Maximum", "Embedding", "UpsampleNearest2D", "UpsampleBilinear2D", "PixelShuffle",
))  # fmt: skip
"""Piecewise linear jointly in all operands."""

PRODUCTS = frozenset((
    "Mul", "Mm", "Mv", "Dot", "Bmm", "Addmm", "Addmv", "Baddbmm", "Convolution", "MkldnnConvolution",
    "Linear", "PreluKernel", "NativeBatchNorm", "CudnnBatchNorm",
))  # fmt: skip
"""Linear in each operand alone: allowed if no weight reaches two of them."""

KNOWN_CURVED = {
    "Gelu": "GELU is not piecewise linear",
    "Silu": "SiLU is not piecewise linear",
    "Sigmoid": "a sigmoid is not piecewise linear",
    "Tanh": "tanh is not piecewise linear",
    "Softmax": "attention (a softmax inside the network) is not piecewise linear",
    "SafeSoftmax": "attention (a softmax inside the network) is not piecewise linear",
    "LogSoftmax": "a log-softmax inside the network is not piecewise linear",
    "ScaledDotProductFlashAttentionForCpu": "attention is not piecewise linear",
    "NativeLayerNorm": "LayerNorm divides by a norm that depends on the weights",
    "NativeGroupNorm": "GroupNorm divides by a norm that depends on the weights",
}


def kind(node: Any) -> str:
    """An autograd node's operation: ``Addmm`` for ``AddmmBackward0``."""
    return re.sub(r"(Default)?Backward\d*$", "", node.name().split("::")[-1]).lstrip("_")


def topological(root: Any) -> list[Any]:
    """The nodes below ``root``, each after all that it depends on."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return order


def curved_because(output: Tensor, leaves: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """Why ``output`` cannot be proved piecewise linear in each of ``leaves`` alone; empty if it is.

    Args:
        output: a tensor with its graph.
        leaves: the weights, leaves of that graph.
        names: what to call them.
    """
    if output.grad_fn is None:
        return []
    order = topological(output.grad_fn)
    leaf_bits = {id(leaf): 1 << i for i, leaf in enumerate(leaves)}
    below: dict[Any, int] = {}
    uses: dict[int, int] = {}
    reasons: dict[str, None] = {}
    for node in order:
        operands = [0 if lower is None else below[lower] for lower, _ in node.next_functions]
        for lower, _ in node.next_functions:
            if lower is not None and hasattr(lower, "variable"):
                uses[id(lower.variable)] = uses.get(id(lower.variable), 0) + 1
        if hasattr(node, "variable"):
            below[node] = leaf_bits.get(id(node.variable), 0)
            continue
        joint = 0
        for bits in operands:
            joint |= bits
        below[node] = joint
        if joint and (reason := _curved(node, operands, names)):
            reasons[reason] = None
    for leaf, name in zip(leaves, names, strict=True):
        if uses.get(id(leaf), 0) > 1:
            reasons[f"weight {name!r} is tied or reused"] = None
    return list(reasons)


def _curved(node: Any, operands: list[int], names: Sequence[str]) -> str | None:
    operation = kind(node)
    if operation in LINEAR:
        return None
    if operation.endswith("BatchNorm") and getattr(node, "_saved_training", False):
        return "batch norm in train mode divides by a norm that depends on the weights"
    if operation in PRODUCTS:
        for i, first in enumerate(operands):
            for second in operands[i + 1 :]:
                if first & second:
                    name = names[(first & second).bit_length() - 1]
                    return f"weight {name!r} reaches both sides of a product ({operation})"
        return None
    if operation == "Div":
        return None if operands[1:] in ([], [0]) else "a division by something that depends on the weights"
    return KNOWN_CURVED.get(operation, f"{operation} is not known to be piecewise linear")
