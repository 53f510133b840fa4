"""Whether a model's outputs are classes, and which measures require that."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from conadv_lab.sharpness.problem.problem import Problem

NORMALISED = "_logit_normalised"
FEWEST = 3  # normalised logits of two classes are always ±1


def classes_of(output: Any, targets: Any, labelled: bool) -> int:
    """Number of classes on axis 1 of the outputs; 0 if the targets do not indicate classes there.

    Args:
        labelled: a loss for class labels was called, whose targets may be distributions over classes.
    """
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor) or output.ndim < 2:
        return 0
    if targets.is_floating_point() or targets.is_complex():
        return output.shape[1] if labelled and targets.shape == output.shape else 0
    positions = (*output.shape[:1], *output.shape[2:])
    return output.shape[1] if tuple(targets.shape) == positions else 0


def require_meaning(problem: "Problem", name: str) -> None:
    """Reject a measure that is undefined for this problem.

    Raises:
        ValueError: the measure uses normalised logits, but the outputs are not classes.
    """
    if name.endswith(NORMALISED) and problem.classes < FEWEST:
        raise ValueError(
            f"{name} needs outputs of at least {FEWEST} classes on axis 1, with class labels as targets; "
            f"use {name.removesuffix(NORMALISED)}"
        )
