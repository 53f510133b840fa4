"""Activation checkpointing makes parts of a forward again in the backward: it changes no gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods import METHODS, method_of
from conadv_lab.models.norm import mixture_batch_norm
from tests.conftest import double, image_set

CRITERION = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Two blocks with batch norm, the second of which may be made again; ``folded`` images are rows of two each."""

    def __init__(self, reentrant: bool | None = None, folded: bool = False) -> None:
        super().__init__()
        self.reentrant, self.folded = reentrant, folded
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.second = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
            self.last = nn.LazyLinear(4)
            self(torch.zeros(2, 2, 6, 6))

    def forward(self, x):
        x = self.first(x)
        if self.folded:
            x = x.unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1)
        again = self.reentrant is not None
        x = checkpoint(self.second, x, use_reentrant=self.reentrant) if again else self.second(x)
        if self.folded:
            x = x.unflatten(0, (-1, 2)).flatten(1, 2)
        return self.last(x.flatten(1))


def gradients_and_statistics(net: Net, name: str, **options) -> list[torch.Tensor]:
    """After two steps of two micro-batches without an optimizer's, so that nothing grows."""
    config = resolved(Config().replace(method=name, epsilon=0.1, **options))
    method, model = method_of(config), mixture_batch_norm(net.double())
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    batch = round(16 * method.new_fraction)
    steps = Stream(
        image_set(50), seed=5, batch=batch, first_batch=max(16, batch), steps=4, micro_batch=batch // 2,
        replays=method.replays, augment=double,
    )  # fmt: skip
    found = []
    for number in range(3):
        method.backward(model, steps.step(number, method.lookahead), CRITERION)
        found += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found += [buffer.double() for buffer in model.buffers()]
        model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_and_statistics_are_those_without_checkpointing(name, reentrant):
    expected = gradients_and_statistics(Net(), name)
    if reentrant and (METHODS[name].side == "attack" or name == "conadv-sam"):
        # torch has no input gradients through it, and says what to do.
        with pytest.raises(RuntimeError, match="set use_reentrant=False"):
            gradients_and_statistics(Net(reentrant), name)
        return
    found = gradients_and_statistics(Net(reentrant), name)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"attack_statistics": "batch"}, {"attack_steps": 2}, {"staleness": 2}], ids=str
)
def test_attacks_of_every_kind(options):
    expected = gradients_and_statistics(Net(), "conadv", **options)
    for one, other in zip(gradients_and_statistics(Net(False), "conadv", **options), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_two_forwards_that_share_a_backward_are_not_told_apart():
    """Where a norm sees other rows than images, both halves of an equal-cost step have a forward of their own."""
    gradients_and_statistics(Net(None, folded=True), "copy-equal")
    with pytest.raises(
        ValueError, match=r"activation checkpointing .* allowed .* a paired method, or no checkpointing"
    ):
        gradients_and_statistics(Net(False, folded=True), "copy-equal")
    expected = gradients_and_statistics(Net(None, folded=True), "copy")
    for one, other in zip(gradients_and_statistics(Net(False, folded=True), "copy"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
