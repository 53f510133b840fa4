"""The cheap second derivatives against PyTorch's own, and which graphs an operator keeps."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from conadv_lab.sharpness.operators.matrices import GGN, Hessian
from conadv_lab.sharpness.operators.twice import CheapTwice
from conadv_lab.sharpness.problem.problem import Problem
from tests.sharpness.conftest import cnn, dense_hessian, mlp, ragged_batches

LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3), (5, 3, 7, 7)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), (5, 3, 7, 7)),
    "strided, padded": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 8, 7)),
    "two strides": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 3, 8, 7)),
    "dilated groups": (nn.Conv2d(4, 6, 2, dilation=2, groups=2), (5, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (5, 4, 7, 7)),
    "padding by a word": (nn.Conv2d(3, 4, 3, padding="same"), (5, 3, 7, 7)),
    "one axis": (nn.Conv1d(3, 4, 3, padding=1), (5, 3, 9)),
    "three axes": (nn.Conv3d(2, 3, 2), (5, 2, 4, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "batch norm of one axis": (nn.BatchNorm1d(3), (5, 3)),
    "batch norm without weights": (nn.BatchNorm2d(3, affine=False), (5, 3, 4, 4)),
    "batch norm without statistics": (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 4)),
}


def second_derivatives(layer, x, cheap):
    """The curvature of a curved function of the layer's output in its weights and inputs, along one vector."""
    generator = torch.Generator().manual_seed(0)
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    if cheap:
        with CheapTwice():
            y = layer(leaves[0])
    else:
        y = layer(leaves[0])
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).tanh().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in leaves]
    return torch.autograd.grad(gradients, leaves, along)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_second_derivatives_are_pytorchs(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    if isinstance(getattr(layer, "running_var", None), torch.Tensor):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(*(second_derivatives(layer, x, c) for c in (True, False)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_the_graph_of_a_convolution_is_ours_and_of_what_is_not_safe_pytorchs():
    x = torch.randn(2, 3, 5, 5)
    with CheapTwice():
        assert "_Convolution" in type(nn.Conv2d(3, 4, 3, bias=False)(x).grad_fn).__name__
        assert "Addcmul" in type(nn.BatchNorm2d(3).eval()(x).grad_fn).__name__
        for layer, data in ((nn.Conv2d(3, 4, 3).bfloat16(), x.bfloat16()), (nn.BatchNorm2d(3), x)):
            assert "_Convolution" not in type(layer(data).grad_fn).__name__
            assert "Addcmul" not in type(layer(data).grad_fn).__name__


@pytest.mark.parametrize("operator", [Hessian, GGN])
def test_one_planned_product_keeps_nothing_and_many_are_the_same_bits(operator):
    problem = Problem(cnn(), nn.CrossEntropyLoss(), ragged_batches("cnn", torch.float32))
    once, many = operator(problem, planned=1), operator(problem, planned=20)
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(once @ vector, many @ vector)
    assert torch.equal(once @ vector, many @ vector)
    assert (len(once._kept), len(many._kept)) == (0, 3)
    with pytest.raises(ValueError, match="planned is 0"):
        operator(problem, planned=0)


def test_frozen_layers_before_and_after_the_chosen_ones():
    """A chosen convolution behind another that takes no gradient, and one before it that must pass it on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2),
        nn.Flatten(), nn.Linear(18, 5),
    ).double()  # fmt: skip
    batches = ragged_batches("cnn")
    truth = dense_hessian(model, batches, cross_entropy)
    whole = Problem(model, nn.CrossEntropyLoss(), batches).slices()
    for name in ("0.weight", "2.weight", "3.weight", "5.bias"):
        block = Hessian(Problem(model, nn.CrossEntropyLoss(), batches, params=[name])).dense()
        torch.testing.assert_close(block, truth[whole[name], whole[name]], atol=1e-12, rtol=0)


def test_a_weight_used_twice_has_both_its_derivatives():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1), mlp()

        def forward(self, x):
            return self.head(self.conv(self.conv(x).tanh()))

    torch.manual_seed(0)
    model, batches = Twice().double(), ragged_batches("cnn")
    truth = dense_hessian(model, batches, cross_entropy)
    torch.testing.assert_close(
        Hessian(Problem(model, nn.CrossEntropyLoss(), batches)).dense(), truth, atol=1e-10, rtol=0
    )
