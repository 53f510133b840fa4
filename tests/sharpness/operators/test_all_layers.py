"""Every layer and mean-reduction loss of torch.nn: Hessians and traces against differences of gradients."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.exact import exact_trace
from tests.sharpness.oracle import difference_hessian
from tests.sharpness.zoo import LOSSES, PLAIN, REFUSED, WEIGHTED, N, real, subject


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [*WEIGHTED, *PLAIN])
def test_a_layers_hessian_is_that_of_differences(name: str) -> None:
    model, x, y = subject((WEIGHTED | PLAIN)[name])
    check(name, model, nn.CrossEntropyLoss(), x, y)


def check(name: str, model: nn.Module, criterion: Any, x: Any, y: Any) -> None:
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            measure(model, criterion, (x, y), ("trace",))
        return
    truth = difference_hessian(model, criterion, x, y)
    problem = Problem(model, criterion, (x, y))
    ours = Hessian(problem).dense()
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-7 * float(truth.abs().max()) + 1e-9)
    found = exact_trace(problem)
    if found.value is not None:
        assert found.value == pytest.approx(float(truth.trace()), rel=1e-6, abs=1e-8)
    report = measure(model, criterion, (x, y), ("top_eigenvalue", "trace"))
    values = torch.linalg.eigvalsh((truth + truth.T) / 2)
    for number, value in (("top_eigenvalue", values[-1]), ("trace", values.sum())):
        error = 2 * report[number].error + 1e-6 * float(values.abs().max()) + 1e-8
        assert abs(report[number].value - float(value)) <= error


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_hessian_is_that_of_differences(name: str) -> None:
    model, criterion, targets = LOSSES[name]
    check(name, model, criterion, real(N, 4), targets)


OTHERS = (
    "LazyBatchNorm",
    "LazyConv",
    "LazyInstanceNorm",
    "LazyLinear",
    "Container",
    "RNNBase",
    "RNNCellBase",
)
"""Bases, and layers that become others at their first forward pass."""


def test_no_layer_with_weights_and_no_loss_is_left_out() -> None:
    known = WEIGHTED.keys() | PLAIN.keys() | LOSSES.keys()
    for name, kind in inspect.getmembers(nn, inspect.isclass):
        if not issubclass(kind, nn.Module) or name in known or name.startswith(OTHERS):
            continue
        assert not name.endswith("Loss"), name
        assert "Parameter(" not in inspect.getsource(kind.__init__), name
