"""Whether a model's outputs are classes, and which measures have a meaning only then."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from conadv_lab.sharpness.problem.problem import Problem

NORMALISED = "_logit_normalised"
FEWEST = 3  # logits of two classes are ±1 once they are normalised, whatever the weights


def classes_of(output: Any, targets: Any, labelled: bool) -> int:
    """How many classes axis 1 of the outputs holds; 0 if the targets show none there.

    Args:
        labelled: a loss of class labels was called, whose targets may be distributions over classes.
    """
    if not isinstance(output, Tensor) or not isinstance(targets, Tensor) or output.ndim < 2:
        return 0
    if targets.is_floating_point() or targets.is_complex():
        return output.shape[1] if labelled and targets.shape == output.shape else 0
    positions = (*output.shape[:1], *output.shape[2:])
    return output.shape[1] if tuple(targets.shape) == positions else 0


def require_meaning(problem: "Problem", name: str) -> None:
    """Refuse a measure that has no meaning for this problem.

    Raises:
        ValueError: on normalised logits, where the outputs are no classes.
    """
    if name.endswith(NORMALISED) and problem.classes < FEWEST:
        raise ValueError(
            f"{name} needs outputs of at least {FEWEST} classes on axis 1, with class labels as targets; "
            f"ask for {name.removesuffix(NORMALISED)}"
        )
