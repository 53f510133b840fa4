"""Modules needed by a step but not by a method's facts: each is imported when a name in it is first used.

So help, plans and the simulator can read every method's facts without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from conadv_lab.data import hashing
    from conadv_lab.methods import forwards, moving, signs, steps
    from conadv_lab.models import norm
else:

    class _Later:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._module), name)

    torch, hashing, norm = map(_Later, ("torch", "conadv_lab.data.hashing", "conadv_lab.models.norm"))
    forwards, moving, signs, steps = (
        _Later(f"conadv_lab.methods.{name}") for name in ("forwards", "moving", "signs", "steps")
    )
