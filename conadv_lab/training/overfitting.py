"""Catastrophic overfitting: training on a single-step attack suddenly stops helping against any other attack.

Only PGD accuracy shows it: it falls to almost zero while the accuracy under the training attack rises (Wong et al.,
"Fast is better than free", ICLR 2020).
"""

import warnings
from collections.abc import Iterable
from typing import Any

from conadv_lab.methods.base import Method

DROP = 20.0
"""Drop in PGD accuracy between two evaluations, in percentage points."""
KEY = "catastrophic_overfitting"


def overfitting(
    method: Method, history: Iterable[dict[str, Any]], figures: dict[str, float]
) -> dict[str, float]:
    """``{"catastrophic_overfitting": points lost}``, with a warning, if ``figures`` shows it; else {}.

    Args:
        method: the run's; only those that train on a single-step attack are checked.
        history: earlier lines of metrics.
        figures: metrics of the new evaluation.

    >>> from conadv_lab.methods.families.robust import FGSMRS
    >>> with warnings.catch_warnings(record=True):
    ...     overfitting(FGSMRS(0.1), [{"pgd_accuracy": 41.0}, {"loss": 1.0}], {"pgd_accuracy": 2.0})
    {'catastrophic_overfitting': 39.0}
    """
    before = [line["pgd_accuracy"] for line in history if "pgd_accuracy" in line]
    if not (method.single_step and before and "pgd_accuracy" in figures):
        return {}
    now, lost = figures["pgd_accuracy"], before[-1] - figures["pgd_accuracy"]
    if lost <= DROP:
        return {}
    warnings.warn(
        f"catastrophic overfitting: PGD accuracy fell from {before[-1]:.1f} to {now:.1f} % between two evaluations; "
        "try a smaller --epsilon or --attack-step, or an attack of more steps",
        stacklevel=2,
    )
    return {KEY: lost}


def first_told(history: Iterable[dict[str, Any]]) -> int | None:
    """The step of the first line of metrics that reports it."""
    return next((line["step"] for line in history if KEY in line), None)
