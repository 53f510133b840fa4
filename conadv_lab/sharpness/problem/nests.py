"""Inputs and targets as nested tensors: moved, sliced, hashed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LABELS = ("labels", "label")


def to_device(data: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The same nested tensors on ``device``, floating-point ones as ``dtype`` (``None`` keeps theirs).

    Complex ones get parts of that dtype, or of float32 if it is half precision.
    """
    if isinstance(data, Tensor):
        if data.is_complex() and dtype is not None:
            return data.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        return data.to(device, dtype if data.is_floating_point() else None)
    if isinstance(data, Mapping):
        return {key: to_device(value, device, dtype) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return tuple(to_device(value, device, dtype) for value in data)
    return data


def real_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with a last axis of two, real and imaginary part; others unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def copied(data: Any) -> Any:
    """A deep copy of nested tensors, which user code may modify."""
    if isinstance(data, Tensor):
        return data.clone()
    if isinstance(data, Mapping):
        return {key: copied(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return tuple(copied(value) for value in data)
    return data


def first_tensor(data: Any) -> Tensor:
    """The first tensor of a batch's inputs or targets; its first axis indexes the examples."""
    if isinstance(data, Tensor):
        return data
    if isinstance(data, Mapping):
        return first_tensor(next(iter(data.values())))
    if isinstance(data, (list, tuple)) and data:
        return first_tensor(data[0])
    raise ValueError(f"a batch is (inputs, targets) of tensors; got {type(data).__name__}")


def take(data: Any, index: slice | Tensor) -> Any:
    """Some examples of nested tensors, by index on the first axis."""
    if isinstance(data, Tensor):
        return data[index] if data.ndim else data
    if isinstance(data, Mapping):
        return {key: take(value, index) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return tuple(take(value, index) for value in data)
    return data


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and targets: the parts of a pair; of a mapping, ``labels`` are the targets, the rest the inputs.

    >>> pair({"input_ids": 1, "labels": 2})
    ({'input_ids': 1}, 2)
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        for name in LABELS:
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
        raise ValueError(f"a batch has the keys {', '.join(map(str, batch))}; one must be called 'labels'")
    size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    raise ValueError(f"a batch is {type(batch).__name__}{size}; allowed: (inputs, targets)")


def hash_into(digest: Any, *data: Any) -> None:
    """Feed every tensor's bytes to a digest, in order."""
    for item in data:
        if isinstance(item, Tensor):
            digest.update(item.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            hash_into(digest, *item.values())
        elif isinstance(item, (list, tuple)):
            hash_into(digest, *item)


def cpu(numbers: float | Sequence[float]) -> Tensor:
    """Numbers as a float64 tensor on the CPU, whatever the default device."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
