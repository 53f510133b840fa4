"""Curvature and sharpness of any model.

``measure(model, criterion, batches)`` returns a report; the underlying operators and algorithms can also be used
alone. Nothing here depends on training. Names load on first use, so that importing this does not import torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "measure": "measures.front",
    "names": "measures.front",
    "Report": "measures.results",
    "Measure": "measures.results",
    "Problem": "problem.problem",
    "Hessian": "operators.matrices",
    "GGN": "operators.matrices",
    "Fisher": "operators.matrices",
    "EmpiricalFisher": "operators.matrices",
    "Lanczos": "spectrum.eigen",
    "eigenpairs": "spectrum.eigen",
    "exact_trace": "spectrum.exact",
    "deflated_trace": "spectrum.trace",
    "hutch_pp": "spectrum.trace",
    "xtrace": "spectrum.trace",
    "between": "measures.landscape",
    "compare": "report.comparison",
    "figures": "report.figures",
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
