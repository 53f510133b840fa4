"""What a run does for AutoWU, a schedule that reads the losses: keep them, test them after an epoch, tell all ranks."""

import math
from typing import Any

import torch

from conadv_lab.methods.base import Losses
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.training.build import Parts


def growing(parts: Parts) -> AutoWU | None:
    """The run's schedule while it makes the learning rate grow."""
    schedule = parts.schedule
    return schedule if isinstance(schedule, AutoWU) and schedule.growing else None


def note(schedule: AutoWU, parts: Parts, number: int, losses: Losses) -> None:
    """Before the optimizer's step: keep the clean loss, or what the adversarial one is if that is not finite."""
    loss = losses.clean
    if losses.adversarial is not None:
        loss = torch.where(torch.isfinite(losses.adversarial), loss, losses.adversarial)
    gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
    schedule.note(number, loss, gradients)


def judge(schedule: AutoWU, parts: Parts, number: int, losses: Losses) -> dict[str, Any]:
    """After the optimizer's step: test the losses where a test is due; returns what to log of it.

    Rank 0 decides and tells the others: a sum over ranks may differ in its last digit from one to the next. On a CPU,
    where reading a loss costs nothing, one that is not finite ends the growth at once, elsewhere after its epoch.
    """
    taken = number + 1
    if not schedule.due(taken) and not (parts.device.type == "cpu" and _broken(losses)):
        return {}
    line: dict[str, Any] = {}
    if parts.ranks.first:
        verdict = schedule.judge(taken)
        line = {
            "autowu_probability": verdict.probability,
            "autowu_votes": verdict.votes,
            "autowu_positives": verdict.positives,
            "autowu_lr": verdict.lr,
        }
        if not schedule.growing:
            line["autowu_reason"] = schedule.reason
    found = parts.ranks.sum(schedule.found if parts.ranks.first else 0.0)
    if found and not parts.ranks.first:
        schedule.follow(taken, found)
    return line


def _broken(losses: Losses) -> bool:
    both = losses.clean, losses.adversarial
    return any(loss is not None and not math.isfinite(loss.item()) for loss in both)
