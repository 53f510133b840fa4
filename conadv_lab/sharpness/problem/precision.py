"""In which arithmetic a model really runs: its own type or autocast; and how far that can be trusted."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def autocast_around(device: torch.device) -> torch.dtype | None:
    """The type to which autocast casts here and now; ``None`` where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def under(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to this type, or none, whatever is around: sums and bases of vectors must not be cast."""
    if autocast is None and autocast_around(device) is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


class AutocastWatch(TorchFunctionMode):
    """Notes the type to which autocast casts, if it is on anywhere in a forward pass; ``found`` holds it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: torch.dtype | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found = self.found or autocast_around(self.device)
        return func(*args, **(kwargs or {}))


def arithmetic(precision: torch.dtype, autocast: torch.dtype | None, device: torch.device) -> str:
    """What a report calls it.

    >>> arithmetic(torch.float32, torch.bfloat16, torch.device("cpu"))
    'float32 under bfloat16 autocast'
    """
    own = str(precision).removeprefix("torch.")
    if autocast is not None:
        return f"{own} under {str(autocast).removeprefix('torch.')} autocast"
    return own


def roundoff(precision: torch.dtype, autocast: torch.dtype | None, device: torch.device) -> float:
    """The relative spacing of the coarsest numbers that take part."""
    finest = float(torch.finfo(precision).eps)  # float32 is full there, see `full_float32`
    return finest if autocast is None else max(finest, float(torch.finfo(autocast).eps))


def trusted(eps: float) -> float:
    """The relative error taken for a number summed of many: 100 ε, in coarse arithmetic 8 ε.

    Coarse products are summed in float32, where their errors average out. bfloat16: 6 %.
    """
    return (100 if eps < 1e-5 else 8) * eps
