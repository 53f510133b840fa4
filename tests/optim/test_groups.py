"""The split into decayed parameters and the skip list."""

import pytest
import torch
from torch import nn

from conadv_lab.optim.groups import parameter_groups


def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))


def test_one_dimensional_parameters_are_skipped():
    net = model()
    decayed, skipped = parameter_groups(net, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight), id(net[3].weight)]
    assert [id(p) for p in skipped["params"]] == [
        id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[3].bias)
    ]
    assert (decayed["weight_decay"], skipped["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    net = model()
    net[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, 0.1)) == 4


def test_serves_torchs_sgd():
    net = model()
    optimizer = torch.optim.SGD(parameter_groups(net, 0.5), lr=1.0)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    before = [param.detach().clone() for param in net.parameters()]
    optimizer.step()
    for param, value in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(param.data, value * (0.5 if param.ndim > 1 else 1.0))


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="weight_decay is -1"):
        parameter_groups(model(), -1)
    with pytest.raises(ValueError, match="trainable parameters is 0; allowed: at least 1"):
        parameter_groups(nn.ReLU(), 0.1)
