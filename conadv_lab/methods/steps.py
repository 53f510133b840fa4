"""Building blocks of a step's gradient: forward and backward of a micro-batch, sums, a checked criterion."""

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from conadv_lab.criteria import failing, kinds, reduction
from conadv_lab.data.loader import Batch, Step
from conadv_lab.methods.base import Losses
from conadv_lab.methods.forwards import Criterion, Judge, outputs_of, rows_of, twice
from conadv_lab.methods.lanes import Lanes
from conadv_lab.models.mixture import Parts, RowsMultiplied
from conadv_lab.models.norm import Branch, backward_of, branch_of, left_no_statistics, takes_both

ALONE = Lanes()
"""Passes in sequence."""


def train_on(
    model: nn.Module,
    images: Tensor,
    batch: Batch,
    criterion: Criterion,
    weight: float,
    branch: Branch,
    *,
    counted: bool = True,
    lanes: Lanes = ALONE,
) -> Tensor:
    """Forward and backward of one micro-batch; returns its share of the step's unweighted mean loss.

    Args:
        counted: whether the forward pass updates the running statistics; a step's first pass over its images does, a
            second one does not.
        lanes: runs the backward pass. Images that require a gradient get it in ``.grad``.
    """
    with branch_of(model, branch, counted=counted):
        loss = criterion(outputs_of(model, images, batch.tokens), batch.labels)
    scale = weight * batch.share
    with backward_of(model, branch):
        images.grad = lanes.backward(
            loss if scale == 1 else loss * scale, model, images if images.requires_grad else None
        )
    return loss.detach() * batch.share


def train_on_both(
    model: nn.Module,
    clean: Batch,
    altered: Batch,
    criterion: Criterion,
    weights: tuple[float, float],
    lanes: Lanes = ALONE,
) -> tuple[Tensor, Tensor]:
    """Both halves of an equal-cost step in one backward pass, and in one forward pass as large as a vanilla step's.

    The halves have separate forward passes if a batch norm's rows are not images, as their order is then unknown.

    Returns the shares of the step's unweighted mean losses, clean and altered.
    """
    branch: Parts | None = (len(clean.labels), len(altered.labels))
    outputs = _together(model, clean, altered) if clean.tokens is None and takes_both(model) else None
    if outputs is None:
        branch, outputs = None, _apart(model, clean, altered)
    losses = criterion(outputs[0], clean.labels), criterion(outputs[1], altered.labels)
    loss = losses[0] * (weights[0] * clean.share) + losses[1] * (weights[1] * altered.share)
    images = clean.images
    with backward_of(model, branch):
        images.grad = lanes.backward(loss, model, images if images.requires_grad else None)
    return losses[0].detach() * clean.share, losses[1].detach() * altered.share


def _together(model: nn.Module, clean: Batch, altered: Batch) -> Any:
    """The outputs of a joint forward pass; None if the halves need separate ones."""
    counts = len(clean.labels), len(altered.labels)
    try:
        with branch_of(model, counts):
            outputs = outputs_of(model, torch.cat([clean.images, altered.images]))
    except RowsMultiplied:
        if left_no_statistics(model):
            return None
        raise
    if isinstance(outputs, Tensor):
        return outputs.split(counts)
    return rows_of(outputs, 0, counts[0]), rows_of(outputs, counts[0], sum(counts))


def _apart(model: nn.Module, clean: Batch, altered: Batch) -> Any:
    with branch_of(model, "main"):
        first = outputs_of(model, clean.images, clean.tokens)
    with branch_of(model, "adversarial"):
        return first, outputs_of(model, altered.images, altered.tokens)


def train_on_clean(
    model: nn.Module, step: Step, criterion: Criterion, weight: float, lanes: Lanes = ALONE
) -> Tensor:
    """Train on the step's own images through the main branch; returns their mean loss."""
    return total(train_on(model, b.images, b, criterion, weight, "main", lanes=lanes) for b in step.batches())


def gradient_of(images: Tensor) -> Tensor:
    """The gradient that a backward pass left in images that required it."""
    assert images.grad is not None
    return images.grad


def total(parts: Iterable[Tensor]) -> Tensor:
    """Sum over micro-batches, one at a time.

    A list of results would fragment the CPU's heap between freed activations, which would then grow with their number.
    """
    return reduce(torch.add, parts)


def totals(pairs: Iterable[tuple[Tensor, Tensor]]) -> Losses:
    """Like `total`, for clean and adversarial losses."""
    return Losses(*reduce(lambda sums, pair: (sums[0] + pair[0], sums[1] + pair[1]), pairs))


class MeanCheck:
    """Wraps a criterion and raises at its first use if it is not a mean over the images.

    With a sum, loss weights and micro-batch shares would mean something else.
    """

    def __init__(self) -> None:
        self._judge: Judge | None = None
        self._is_checked = False

    def __call__(self, criterion: Criterion) -> Criterion:
        if self._judge is None or self._judge.criterion is not criterion:
            self._judge, self._is_checked = Judge(criterion), False
        return self._judge if self._is_checked else self._checking(self._judge)

    def _checking(self, judge: Judge) -> Criterion:
        def checked(outputs: Any, labels: Tensor) -> Tensor:
            if self._is_checked:
                return judge(outputs, labels)
            with failing(f"the criterion fails on outputs {kinds(outputs)} and labels {kinds(labels)}"):
                loss = judge(outputs, labels)
            if not self._is_checked:
                check_mean(judge, outputs, labels)
                self._is_checked = True
            return loss

        return checked


@torch.no_grad()
def check_mean(criterion: Criterion, outputs: Any, labels: Tensor) -> None:
    """Raise ``ValueError`` unless the loss is a scalar that does not change when every image is repeated."""
    once, both = criterion(outputs, labels), twice(outputs)
    if once.ndim != 0:
        raise ValueError(
            f"the criterion returned a tensor of shape {tuple(once.shape)}; "
            "allowed: one mean over the images (reduction='mean')"
        )
    if both is None:
        return
    value, again = once.item(), criterion(both, torch.cat([labels, labels])).item()
    rounding = max(1e-3, 4 * torch.finfo(once.dtype).eps)
    if math.isfinite(value) and reduction(value, again, rounding, least=1e-5) != "mean":
        raise ValueError(
            f"the criterion gave {value:.4g} for a batch and {again:.4g} for the same batch twice; "
            "allowed: a mean over the images (reduction='mean'), not a sum"
        )
