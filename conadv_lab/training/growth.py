"""A run's part in AutoWU, a schedule driven by losses: record them, test them after each epoch, tell all ranks."""

import math
from typing import Any

import torch

from conadv_lab.methods.base import Losses
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.training.build import Parts


def growing(parts: Parts) -> AutoWU | None:
    """The run's AutoWU schedule while it is growing the learning rate, else None."""
    schedule = parts.schedule
    return schedule if isinstance(schedule, AutoWU) and schedule.growing else None


def note(schedule: AutoWU, parts: Parts, number: int, losses: Losses) -> None:
    """Before the optimizer's step: record the clean loss, or the adversarial one if that is not finite."""
    loss = losses.clean
    if losses.adversarial is not None:
        loss = torch.where(torch.isfinite(losses.adversarial), loss, losses.adversarial)
    gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
    schedule.note(number, loss, gradients)


def judge(schedule: AutoWU, parts: Parts, number: int, losses: Losses) -> dict[str, Any]:
    """After the optimizer's step: test the losses if a test is due; returns what to log.

    Rank 0 decides for all, as a sum over ranks may differ between them in its last digit. On a CPU, where reading a
    loss costs nothing, a non-finite one ends the growth at once; elsewhere after its epoch.
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
