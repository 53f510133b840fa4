"""What LARS and LAMB share: lists of like tensors, their norms, and cuts that fit a core's cache."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from conadv_lab.mistakes import require

# 128 Ki elements of weight, gradient, velocity and scratch are 2 MiB in float32, an L2 cache's size, and keep
# torch's operations above the 32 Ki elements a thread below which they run on one; best of 2¹⁵ … 2²⁰ tried.
_BLOCK = 1 << 17


def with_gradients(params: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """(parameters, gradients) of those that have one, in lists of one device and dtype each."""
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param in params:
        if param.grad is None:
            continue
        require(not param.grad.is_sparse, "a gradient's layout", "sparse", "dense gradients")
        alike = lists.setdefault((param.device, param.dtype), ([], []))
        alike[0].append(param)
        alike[1].append(param.grad)
    return list(lists.values())


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms of n tensors: (n,), in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].device.type == "cpu":
        # There a norm of everything runs on one thread; a norm for each row runs on all.
        tensors = [
            torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), dtype=dtype)
            if tensor.ndim > 1
            else tensor
            for tensor in tensors
        ]
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def blocks(factors: Sequence[Tensor], *lists: Sequence[Tensor]) -> Iterator[list[Sequence[Tensor]]]:
    """Cut equally shaped tensors alike, so that what one cut holds fits the cache: yields [factors, *lists].

    On a CPU an operation over all parameters streams them through memory; several operations over one block
    read it once. A cut runs along the first dimension, which is a view in any memory format, and takes its
    tensor's 0-d factor along. On other devices one cut holds everything, so that a launch serves all; in the
    product with the factors alone, which have other shapes, torch makes one a tensor.
    """
    if lists[0][0].device.type != "cpu":
        yield [factors, *lists]
        return
    for factor, *tensors in zip(factors, *lists, strict=True):
        tensors = [torch.atleast_1d(tensor) for tensor in tensors]
        rows = max(1, _BLOCK // max(1, tensors[0][:1].numel()))
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield [[factor], *([part] for part in parts)]
