"""Checks that end a run whose losses, parameters or metrics are NaN or infinite, and say how far it got."""

import math
from collections.abc import Mapping

import torch

from conadv_lab.methods.base import Losses
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import Parts


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite; nothing of that step was saved."""


def require_finite(losses: Losses, parts: Parts, folder: RunFolder, number: int) -> None:
    """Raise `NotFinite` if a loss of this step is NaN or infinite."""
    for name, loss in (("clean", losses.clean), ("adversarial", losses.adversarial)):
        if loss is not None and not math.isfinite(loss.item()):
            where = how_far(parts, folder, number)
            raise NotFinite(f"the {name} loss is {loss.item()} at step {number} {where}")


def require_finite_weights(parts: Parts, folder: RunFolder, number: int) -> None:
    """Raise `NotFinite` if a parameter is NaN or infinite after this step."""
    norms = torch._foreach_norm([parameter.detach() for parameter in parts.model.parameters()])
    if not torch.isfinite(torch.stack(norms)).all():
        where = how_far(parts, folder, number)
        raise NotFinite(f"a weight is NaN or infinite after step {number} {where}")


def require_finite_figures(
    figures: Mapping[str, float], parts: Parts, folder: RunFolder, number: int
) -> None:
    """Raise `NotFinite` if a metric of the final evaluation is NaN or infinite."""
    for name, figure in figures.items():
        if not math.isfinite(figure):
            raise NotFinite(f"the final {name} is {figure} {how_far(parts, folder, number)}")


def how_far(parts: Parts, folder: RunFolder, number: int) -> str:
    """How far the run got, its last checkpoint, and what may help."""
    saved = [checkpoint.name for checkpoint in folder.committed()[:1]]
    return (
        f"(epoch {epoch_of(parts, number):.2f}, lr {parts.schedule(number):.4g}); "
        f"last checkpoint: {saved[0] if saved else 'none'}. "
        "A lower --lr or a longer --warmup-epochs may help"
    )


def epoch_of(parts: Parts, number: int) -> float:
    """Epochs completed before this step."""
    return parts.stream.first_place(number) / len(parts.train_set)
