"""Adaptive gradient clipping against its written formula in float64, in every optimizer."""

from math import sqrt

import pytest
import torch
from torch import nn

from conadv_lab.models.nf_resnet import NFResNet
from conadv_lab.optim.clipping import clip_adaptively, clip_before_steps
from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.lamb import LAMB
from conadv_lab.optim.lars import LARS

SHAPES = [(4, 3, 3, 3), (5, 7), (6, 1, 1, 1), (11,), ()]


def literal(weight: torch.Tensor, grad: torch.Tensor, factor: float, eps: float) -> torch.Tensor:
    """A unit at a time, in Python floats."""
    if weight.ndim <= 1:
        return literal(weight.reshape(1, -1), grad.reshape(1, -1), factor, eps).view(grad.shape)
    units = []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        limit = factor * max(sqrt(sum(x * x for x in w)), eps)
        length = sqrt(sum(x * x for x in g))
        units.append([x * limit / length for x in g] if length > limit else g)
    return torch.tensor(units, dtype=torch.float64).view(grad.shape)


def params_and_gradients(seed: int = 0) -> list[nn.Parameter]:
    """Units of weights from 0 to large, gradients from far below their limit to far above."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        param = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
        param.grad = 0.05 * torch.randn(shape, dtype=torch.float64, generator=generator)
        if param.ndim > 1:
            param.data[0], param.grad[1], param.grad[2] = 0.0, 0.0, param.grad[2] * 1e-3
        params.append(param)
    return params


@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_equals_the_written_formula(factor):
    params = params_and_gradients()
    expected = [literal(p.detach(), p.grad, factor, 1e-3) for p in params]
    before = [p.detach().clone() for p in params]
    clip_adaptively(params, factor)
    for param, weight, grad in zip(params, before, expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-12, atol=1e-15)
        assert torch.equal(param, weight)


def test_channels_last_gradients_are_clipped_alike():
    params, others = params_and_gradients(), params_and_gradients()
    others[0].grad = others[0].grad.contiguous(memory_format=torch.channels_last)
    for some in (params, others):
        clip_adaptively(some)
    torch.testing.assert_close(params[0].grad, others[0].grad)


def test_what_is_not_finite_stays_so():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0]])
    clip_adaptively([param])
    assert not torch.isfinite(param.grad).all(dim=1).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(
            [{k: v for k, v in g.items() if k != "adapt"} for g in groups],
            lr=0.1,
            momentum=0.9,
            nesterov=True,
        ),
        lambda groups: LARS(groups, lr=0.1),
        lambda groups: LAMB(groups, lr=0.1),
    ],
    ids=["sgd", "lars", "lamb"],
)
def test_every_optimizer_steps_with_clipped_gradients_over_20_steps(make):
    """As if the gradients had been clipped by the formula by hand; the last linear layer's are not."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(NFResNet((1,), (8,), 5, stem=4, small_images=True).double())
    optimizers = [make(parameter_groups(model, 1e-3)) for model in models]
    clip_before_steps(optimizers[0], models[0], 0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=generator)
        for model in models:
            model.zero_grad()
            model(x).square().sum().backward()
        for name, param in models[1].named_parameters():
            if not name.startswith("head.fc"):
                param.grad = literal(param.detach(), param.grad, 0.01, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arguments", [{"factor": 0.0}, {"eps": 0.0}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"is 0\.0; allowed: a number above 0"):
        clip_adaptively([], **arguments)
