"""Another default device: whatever the package makes without saying where lands on it, and is told by its line.

On a GPU such a tensor stays behind on the CPU and fails when it meets the model, so that this finds, without a GPU,
what would fail there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ELSEWHERE = torch.device("meta")


class _Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.device == ELSEWHERE:
                raise AssertionError(f"torch.{func.__name__} was not told on which device")
        return result


@contextmanager
def elsewhere() -> Iterator[None]:
    """Nothing within may rest on the default device, which is ``meta``, where a tensor has no values."""
    with ELSEWHERE, _Watch():
        yield
