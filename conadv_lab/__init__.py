"""Concurrent adversarial learning (ConAdv) for large-batch training, and the tools to study it.

The names below load on first use, so that ``import conadv_lab`` does not import torch:

>>> import conadv_lab as cl
>>> cl.ConAdv(cl.SignAttack(epsilon=1 / 255), staleness=1).lookahead
1
"""

from importlib import import_module
from typing import Any

from conadv_lab.methods import METHODS

_HOMES = {
    "CapturedStep": "conadv_lab.capture.step",
    "collect": "conadv_lab.frames",
    "lookahead": "conadv_lab.data.lookahead",
    "mixture_batch_norm": "conadv_lab.models.norm",
    "normalised": "conadv_lab.methods.ball",
    "PGDAttack": "conadv_lab.methods.attack",
    "plain_batch_norm": "conadv_lab.models.norm",
    "SignAttack": "conadv_lab.methods.attack",
    "LAMB": "conadv_lab.optim.lamb",
    "LARS": "conadv_lab.optim.lars",
    **{method.__name__: method.__module__ for method in METHODS.values()},
}
_MODULES = ("sharpness", "staleness")

__all__ = sorted([*_HOMES, *_MODULES])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"conadv_lab.{name}")
    raise AttributeError(f"module 'conadv_lab' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
