"""Somebody's own loop, stopped and started again as `docs/loop.md` says, ends in the same bits."""

from itertools import islice

import pytest
import torch
from torch import nn

import conadv_lab as cl

METHODS = {
    "ConAdv": lambda: cl.ConAdv(cl.SignAttack(epsilon=0.1), staleness=1, weights=(0.5, 0.5)),
    "ConAdv, two steps stale": lambda: cl.ConAdv(cl.SignAttack(epsilon=0.1), staleness=2, weights=(0.5, 0.5)),
    "recycled": lambda: cl.Recycled(0.1),
    "FreeAT": lambda: cl.FreeAT(0.1, 0.04, replays=2),
    "FGSM-RS, stale": lambda: cl.FGSMRS(0.1, staleness=1),
    "AsyncSAM": lambda: cl.AsyncSAM(0.05),
    "S²-SAM": lambda: cl.S2SAM(0.05),
    "LookSAM": lambda: cl.LookSAM(0.05, every=2),
}


def loader(sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 1, 4, 4, generator=draw), torch.arange(size)) for size in sizes]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2, 4)], ids=["full batches", "a short batch"])
@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_pending_state_comes_back(name, stop, sizes):
    def parts():
        torch.manual_seed(0)
        model = cl.mixture_batch_norm(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = METHODS[name]()
        method.attach(optimizer)
        return model, method, optimizer

    def train(model, method, optimizer, begin, end):
        steps = cl.lookahead(loader(sizes), steps=8, ahead=method.lookahead, replays=method.replays)
        for step in islice(steps, begin, end):
            method.backward(model, step, nn.CrossEntropyLoss())
            optimizer.step()
            optimizer.zero_grad()

    whole, before, after = parts(), parts(), parts()
    train(*whole, 0, 8)
    train(*before, 0, stop)
    for new, old in zip(after, before, strict=True):
        new.load_state_dict(old.state_dict())
    train(*after, stop, 8)
    for ours, theirs in zip(after[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
