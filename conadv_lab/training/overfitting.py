"""Catastrophic overfitting: from one epoch to the next, training on a single-step attack helps against no other.

It shows in the PGD accuracy alone, which falls to almost nothing, while the accuracy under the attack trained on rises
(Wong et al., "Fast is better than free", ICLR 2020).
"""

import warnings
from collections.abc import Iterable
from typing import Any

from conadv_lab.methods.base import Method

DROP = 20.0
"""Points of PGD accuracy between two evaluations."""
KEY = "catastrophic_overfitting"


def overfitting(
    method: Method, history: Iterable[dict[str, Any]], figures: dict[str, float]
) -> dict[str, float]:
    """``{"catastrophic_overfitting": points lost}`` where it shows in new ``figures``, which is also warned of; or {}.

    Args:
        method: of the run; nothing is told of one that trains on no single-step attack.
        history: earlier lines of metrics.
        figures: of the evaluation that is new.

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
        "a smaller --epsilon or --attack-step, or an attack of more steps, may help",
        stacklevel=2,
    )
    return {KEY: lost}


def first_told(history: Iterable[dict[str, Any]]) -> int | None:
    """The step of the first line of metrics that tells of it."""
    return next((line["step"] for line in history if KEY in line), None)
