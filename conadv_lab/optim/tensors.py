"""What LARS and LAMB share: lists of similar tensors, their norms, and blocks that fit a core's cache.

With DTensors, as from `torch.distributed.fsdp.fully_shard`, each rank updates its own shard; norms are those of the
whole tensors, summed over shards.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from conadv_lab.mistakes import require

# 128 Ki elements of weight, gradient, velocity and scratch are 2 MiB in float32, an L2 cache's size, and keep
# torch's operations above the 32 Ki elements a thread below which they run on one; best of 2¹⁵ … 2²⁰ tried.
_BLOCK = 1 << 17


def with_gradients(params: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """(parameters, gradients) of those with a gradient, in lists with the same device, dtype and sharding."""
    lists: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for param in params:
        if param.grad is None:
            continue
        require(not param.grad.is_sparse, "a gradient's layout", "sparse", "dense gradients")
        sharding = _sharding(param)
        grad = param.grad if sharding is None else param.grad.redistribute(*sharding)  # type: ignore[attr-defined]
        alike = lists.setdefault((param.device, param.dtype, sharding), ([], []))
        alike[0].append(param)
        alike[1].append(grad)
    return list(lists.values())


def shards(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of tensors of one kind, to be changed in place: themselves, or local shards of DTensors."""
    if _sharding(tensors[0]) is None:
        return tensors
    return [tensor.to_local() for tensor in tensors]  # type: ignore[attr-defined]


def _sharding(param: Any) -> Any:
    """(mesh, placements) of a DTensor; None for an ordinary tensor. Avoids its slow import."""
    return (param.device_mesh, param.placements) if hasattr(type(param), "placements") else None


def norms(tensors: list[Tensor], params: list[Tensor]) -> Tensor:
    """Euclidean norms of n tensors: (n,), at least float32; for shards, norms of the whole ``params``."""
    own, sharding = _norms(tensors), _sharding(params[0])
    if sharding is None:
        return own
    mesh, placements = sharding
    squares = own.square_()
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt_()


def _norms(tensors: list[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if tensors[0].device.type == "cpu":
        # On a CPU a full norm runs on one thread, but row-wise norms run on all.
        tensors = [
            torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), dtype=dtype)
            if tensor.ndim > 1
            else tensor
            for tensor in tensors
        ]
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def add_scaled_(tensors: Any, others: Any, factor: float | Tensor) -> None:
    """Add ``factor``, a number or a 0-d tensor on the device, times the others."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor.to(others[0].dtype)))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


def blocks(factors: Sequence[Tensor], *lists: Sequence[Tensor]) -> Iterator[list[Sequence[Tensor]]]:
    """Split equally shaped tensors in the same way into blocks that fit the cache: yields [factors, *lists].

    On a CPU an operation over all parameters streams them through memory; several operations over one block read it
    once. Blocks split the first dimension, which gives views in any memory format, and keep their tensor's 0-d factor.
    On other devices one block has everything, so that one launch serves all; only for the product with the factors,
    whose shapes differ, torch launches once per tensor.
    """
    if lists[0][0].device.type != "cpu":
        yield [factors, *lists]
        return
    for factor, *tensors in zip(factors, *lists, strict=True):
        tensors = [torch.atleast_1d(tensor) for tensor in tensors]
        rows = max(1, _BLOCK // max(1, tensors[0][:1].numel()))
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield [[factor], *([part] for part in parts)]


def require_ordinary(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for parameters without a usable norm: complex ones, and pieces of a flat one."""
    who = type(optimizer).__name__
    names = group.get("param_names") or range(len(group["params"]))
    for name, param in zip(names, group["params"], strict=True):
        if param.is_complex():
            raise ValueError(
                f"parameter {name!r} of {who} is {param.dtype}; allowed: real parameters, such as torch.view_as_real "
                "of a complex one, or torch.optim.SGD for complex ones"
            )
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"parameter {name!r} of {who} is a piece of FullyShardedDataParallel's flat parameter, which has no "
                "per-tensor norm; allowed: torch.distributed.fsdp.fully_shard"
            )


def require_fit(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a state dict matches the shapes of the parameters, which torch does not check."""
    who = type(optimizer).__name__
    own = [group["params"] for group in optimizer.param_groups]
    saved = [group["params"] for group in state["param_groups"]]
    if [len(params) for params in saved] != [len(params) for params in own]:
        raise ValueError(
            f"the state has groups of {[len(params) for params in saved]} parameters; allowed for this {who}: "
            f"{[len(params) for params in own]}"
        )
    numbers = (number for params in saved for number in params)
    for number, param in zip(numbers, (param for params in own for param in params), strict=True):
        for name, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != param.shape:
                raise ValueError(
                    f"the state's {name!r} of parameter {number} has shape {tuple(value.shape)}; allowed for this "
                    f"{who}: {tuple(param.shape)}, the parameter's"
                )
