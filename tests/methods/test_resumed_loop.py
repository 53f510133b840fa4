"""Somebody's own loop, stopped and started again as `docs/loop.md` says, ends in the same bits."""

from itertools import islice

import pytest
import torch
from torch import nn

import conadv_lab as cl

LOADER = [
    (torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(n)), torch.arange(4)) for n in range(3)
]


@pytest.mark.parametrize("staleness", [1, 2])
def test_pending_attacks_come_back(staleness):
    def parts():
        torch.manual_seed(0)
        model = cl.mixture_batch_norm(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
        )
        method = cl.ConAdv(cl.SignAttack(epsilon=0.1), staleness=staleness, weights=(0.5, 0.5))
        return model, method, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model, method, optimizer, begin, end):
        steps = cl.lookahead(LOADER, steps=6, ahead=method.lookahead)
        for step in islice(steps, begin, end):
            method.backward(model, step, nn.CrossEntropyLoss())
            optimizer.step()
            optimizer.zero_grad()

    whole, before, after = parts(), parts(), parts()
    train(*whole, 0, 6)
    train(*before, 0, 3)
    for new, old in zip(after, before, strict=True):
        new.load_state_dict(old.state_dict())
    train(*after, 3, 6)
    for ours, theirs in zip(after[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
