"""Checks cheaply that batches are the same in every pass over the data."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SAMPLE = 256
DEPTH = 4
INNER = ("sampler", "batch_sampler", "dataset", "data_source", "datasets", "loader")

Mark = tuple[Any, ...]


def mark(data: Any) -> Mark:
    """A batch's fingerprint: each tensor's shape, sum and some of its values."""
    return tuple(_mark(part) for part in tree_leaves(data) if isinstance(part, (Tensor, np.ndarray)))


def _mark(part: Tensor | np.ndarray) -> Mark:
    tensor = part.detach() if isinstance(part, Tensor) else torch.from_numpy(part)
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    whole = flat.sum(dtype=torch.float64 if flat.is_floating_point() else torch.int64)
    some = flat[:: max(1, -(-len(flat) // SAMPLE))].to("cpu").contiguous()
    # As text, since NaN is not equal to itself.
    return tuple(tensor.shape), repr(whole.item()), some.view(torch.uint8).numpy().tobytes()


class Passes:
    """Batches for repeated iteration; from the second pass on each is compared with the first pass's."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._marks: list[Mark] | None = None

    def __iter__(self) -> Iterator[Any]:
        first, marks = self._marks, []
        for index, batch in enumerate(self._source):
            marks.append(mark(batch))
            if first is not None and (index >= len(first) or marks[index] != first[index]):
                what = "did not exist in" if index >= len(first) else "differs from"
                raise _changed(f"batch {index} {what} the first pass over the data")
            yield batch
        if first is None:
            self._marks = marks
        elif len(marks) < len(first):
            raise _changed(f"a later pass over the data had {len(marks)} batches, the first one {len(first)}")


def _changed(what: str) -> ValueError:
    return ValueError(
        f"{what}, so each product would use another matrix; allowed: the same batches in every pass, such as "
        "list(batches), a loader without persistent workers, or one without random augmentation"
    )


def generators(batches: Any) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Functions to get and set the state of each random generator in a loader, its samplers or its data."""
    found: dict[int, tuple[Callable[[], Any], Callable[[Any], Any]]] = {}
    layer, seen = [batches], set()
    for _ in range(DEPTH):
        below: list[Any] = []
        for source in layer:
            if id(source) in seen or not hasattr(source, "__dict__"):
                continue
            seen.add(id(source))
            for value in vars(source).values():
                if (access := _access(value)) is not None:
                    found[id(value)] = access
            inner = [vars(source).get(name, getattr(source, name, None)) for name in INNER]
            below += [
                part for some in inner for part in (some if isinstance(some, (list, tuple)) else [some])
            ]
        layer = below
    return list(found.values())


def _access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None
