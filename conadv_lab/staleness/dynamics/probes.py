"""Measurements between steps: the distance to old weights, and how effective their attack still is."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Batch, Step
from conadv_lab.methods.attack import Attack
from conadv_lab.methods.forwards import Criterion, outputs_of
from conadv_lab.models.norm import branch_of
from conadv_lab.staleness.dynamics.snapshots import SnapshotConAdv


def probe(
    method: SnapshotConAdv, model: nn.Module, step: Step, criterion: Criterion, lrs: Sequence[float]
) -> list[dict[str, Any]]:
    """Compare stale and fresh attacks on the step's own images, before training on them; changes nothing.

    Args:
        lrs: learning rates of all steps so far.

    Returns:
        For every worker its ``worker``, ``effective_tau``, ``tau_lr`` (sum of the learning rates of the steps
        between), and as values, over its images,

        - ``sign_agreement``: fraction of pixels in which ∇ₓL(θ_{t−τ}) and ∇ₓL(θ_t), at the clean image, agree in sign;
        - ``gain_ratio``: [L(x̂_stale) − L(x)] / [L(x̂_fresh) − L(x)] at θ_t, through the attacked branch and
          statistics; NaN if the fresh attack gains nothing;
        - ``distance``: ‖θ_t − θ_{t−τ}‖ over all parameters.
    """
    method.remember(model, step.number)
    now = copy.deepcopy(model).eval()  # so that the run's modes, statistics and gradients do not change
    batches = list(step.batches())
    rows = []
    for worker in range(method.workers):
        own = batches[worker :: method.workers]
        lag = method.lag(step.number, worker)
        old = method.model_at(model, step.number, lag) if lag else now
        rows.append(
            {
                "worker": worker,
                "effective_tau": lag,
                "tau_lr": float(sum(lrs[step.number - lag : step.number])),
                **_compared(method.attack, now, old, own, criterion),
                "distance": _distance(model, method.state_at(step.number - lag)) if lag else 0.0,
            }
        )
    return rows


def phase(number: int, warmup: int, steps: int) -> str:
    """A step's phase in the schedule: ``"warm-up"``, or the ``"early"`` or ``"late"`` half of the rest.

    >>> [phase(number, warmup=2, steps=6) for number in range(6)]
    ['warm-up', 'warm-up', 'early', 'early', 'late', 'late']
    """
    if number < warmup:
        return "warm-up"
    return "early" if number - warmup < (steps - warmup) / 2 else "late"


def _compared(
    attack: Attack, now: nn.Module, old: nn.Module, batches: list[Batch], criterion: Criterion
) -> dict[str, float]:
    agreement = clean = stale = fresh = 0.0
    whole = sum(batch.share for batch in batches)
    for batch in batches:
        share = batch.share / whole
        before, after = (attack.gradient(m, batch.images, batch.labels, criterion) >= 0 for m in (old, now))
        agreement += share * (before == after).float().mean().item()
        clean += share * _loss(attack, now, batch.images, batch, criterion)
        stale += share * _loss(attack, now, _attacked(attack, old, batch, criterion), batch, criterion)
        fresh += share * _loss(attack, now, _attacked(attack, now, batch, criterion), batch, criterion)
    ratio = (stale - clean) / (fresh - clean) if fresh > clean else float("nan")
    return {"sign_agreement": agreement, "gain_ratio": ratio}


def _attacked(attack: Attack, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
    return attack.apply(batch, attack.perturb(model, batch, criterion))


@torch.no_grad()
def _loss(attack: Attack, model: nn.Module, images: Tensor, batch: Batch, criterion: Criterion) -> float:
    with branch_of(model, attack.branch, attack.seen_statistics(model)):
        return criterion(outputs_of(model, images), batch.labels).item()


@torch.no_grad()
def _distance(model: nn.Module, state: dict[str, Tensor]) -> float:
    squares = [((p - state[name]).double() ** 2).sum() for name, p in model.named_parameters()]
    return torch.stack(squares).sum().sqrt().item()
