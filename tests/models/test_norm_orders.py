"""A step's statistics and gradients do not depend on the order of its forwards and backwards."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conadv_lab.models.norm import backward_of, branch_of, mixture_batch_norm, one_update

GROUPS = {"main": torch.rand(2, 4, 2, 5, 5).double(), "adversarial": torch.rand(2, 4, 2, 5, 5).double() + 1}


class Net(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)


def taken(order: list[str], again: bool = False) -> list[torch.Tensor]:
    """A step whose ``order`` is of letters: F and B forwards and backwards of main groups, f and b of the others."""
    model = mixture_batch_norm(Net(again).double())
    losses: dict[str, list[torch.Tensor]] = {"main": [], "adversarial": []}
    groups = {branch: list(parts) for branch, parts in GROUPS.items()}
    with one_update(model):
        for letter in order:
            branch = "main" if letter.isupper() else "adversarial"
            if letter in "Ff":
                with branch_of(model, branch):
                    losses[branch].append(model(groups[branch].pop(0)).pow(2).mean())
            else:
                with backward_of(model, branch):
                    losses[branch].pop(0).backward()
    return [p.grad for p in model.parameters()] + [b.double() for b in model.buffers()]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("order", ["FfBbFfBb", "FfbBFfbB", "FFffBBbb", "ffFFBbBb", "fFbfBFbB"])
def test_any_order_gives_the_same_step(order, again):
    for one, other in zip(taken(order, again), taken("FBFBfbfb"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stepping", [True, False])
def test_a_forward_that_is_not_counted_moves_nothing(stepping):
    model = mixture_batch_norm(Net(again=False).double())
    x = GROUPS["main"][0]
    with one_update(model):
        counted = model(x)
    before = [buffer.clone() for buffer in model.buffers()]
    if stepping:
        with one_update(model), branch_of(model, "main", counted=False):
            again = model(x)
    else:
        with branch_of(model, "main", counted=False):
            again = model(x)
    assert torch.equal(again, counted)
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
