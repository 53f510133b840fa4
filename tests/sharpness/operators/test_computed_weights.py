"""Weights that are computed from parameters, or handed over in a list: Hessians against dense ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.exact import exact_trace


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 4))
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(F.linear(x, torch.cat([self.a, self.b]))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cell(x)[0][:, -1])


def dense(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    names, values = zip(*((n, p.detach().clone()) for n, p in model.named_parameters()), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(names, values, flat.split(sizes), strict=True)
        weights = {name: part.view_as(value) for name, value, part in parts}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([value.flatten() for value in values]))


@pytest.mark.parametrize("make", [nn.Conv2d, Standardised, lambda *a: spectral_norm(nn.Conv2d(*a))])
def test_the_hessian_of_a_computed_convolution_weight_is_right(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double().eval()
    x, y = torch.randn(6, 2, 3, 3).double(), torch.randint(0, 3, (6,))
    ours = Hessian(Problem(model, F.cross_entropy, (x, y))).dense()
    torch.testing.assert_close(ours, dense(model, x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("make", "shape"), [(Joined, (20, 4)), (Recurrent, (20, 5, 3))])
def test_weights_in_a_list_are_not_left_out_of_a_trace(make, shape):
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(shape).double(), torch.randint(0, 3, (20,))
    problem = Problem(model, F.cross_entropy, (x, y))
    assert exact_trace(problem).refusals
    found = measure(model, F.cross_entropy, (x, y), ("trace",))["trace"]
    assert abs(found.value - float(dense(model, x, y).trace())) <= 4 * found.error


def test_another_loss_network_or_fact_is_another_measurement(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    data = torch.randn(20, 4), torch.randint(0, 3, (20,))
    wanted = ("top_eigenvalue", "effective_dimension")
    kept = measure(model, nn.CrossEntropyLoss(), data, wanted, resume=tmp_path)
    again = measure(model, nn.CrossEntropyLoss(), data, wanted, resume=tmp_path)
    assert [again[name].value for name in wanted] == [kept[name].value for name in wanted]
    with pytest.raises(ValueError, match="another measurement"):
        measure(model, nn.CrossEntropyLoss(label_smoothing=0.3), data, wanted, resume=tmp_path)
    with pytest.raises(ValueError, match="another measurement"):
        measure(model, nn.CrossEntropyLoss(), data, wanted, resume=tmp_path, facts={"learning_rate": 0.1})
    model[1].running_var.mul_(9)
    with pytest.raises(ValueError, match="another measurement"):
        measure(model, nn.CrossEntropyLoss(), data, wanted, resume=tmp_path)


def test_a_pair_whose_inputs_are_a_tuple_is_one_batch():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.last(a + b)

    a, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    assert Problem(Sum(), F.cross_entropy, ((a, a), y)).batch_sizes == (6,)
