"""Curvature and sharpness of any model.

``measure(model, criterion, batches)`` returns a report; the operators and algorithms below it can be used
alone. Nothing here knows of training. Names load on first use, so that importing costs no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "measure": "measures",
    "names": "measures",
    "Report": "results",
    "Measure": "results",
    "Problem": "problem",
    "Hessian": "operators",
    "GGN": "operators",
    "Fisher": "operators",
    "EmpiricalFisher": "operators",
    "Lanczos": "eigen",
    "eigenpairs": "eigen",
    "exact_trace": "exact",
    "deflated_trace": "trace",
    "hutch_pp": "trace",
    "xtrace": "trace",
    "between": "landscape",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"conadv_lab.sharpness.{_HOMES[name]}"), name)
    raise AttributeError(
        f"module 'conadv_lab.sharpness' has no attribute {name!r}; it offers {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
