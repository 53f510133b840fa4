"""The arithmetic in which a model really runs, its own dtype or autocast, and how accurate that is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def autocast_around(device: torch.device) -> torch.dtype | None:
    """The current autocast dtype; ``None`` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def under(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to this dtype, or disable it, whatever surrounds it: sums and bases of vectors must not be cast."""
    if autocast is None and autocast_around(device) is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


class AutocastWatch(TorchFunctionMode):
    """Detects the autocast dtype, if autocast is on anywhere in a forward pass, in ``found``."""

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
    """The name of the arithmetic in reports.

    >>> arithmetic(torch.float32, torch.bfloat16, torch.device("cpu"))
    'float32 under bfloat16 autocast'
    """
    own = str(precision).removeprefix("torch.")
    if autocast is not None:
        return f"{own} under {str(autocast).removeprefix('torch.')} autocast"
    return own


def roundoff(precision: torch.dtype, autocast: torch.dtype | None, device: torch.device) -> float:
    """The relative spacing of the coarsest numbers involved."""
    finest = float(torch.finfo(precision).eps)  # full float32, see `full_float32`
    return finest if autocast is None else max(finest, float(torch.finfo(autocast).eps))


def trusted(eps: float) -> float:
    """The assumed relative error of a large sum: 100 ε, in low precision 8 ε.

    Low-precision products are summed in float32, where their errors average out. bfloat16: 6 %.
    """
    return (100 if eps < 1e-5 else 8) * eps
