"""Reports say in which arithmetic the model ran, and their errors follow it."""

import pytest
import torch
from torch import Tensor, nn

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import GGN
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import Lanczos, normal_vector
from tests.sharpness.conftest import cnn, ragged_batches

BATCHES = ragged_batches("cnn", torch.float32)
MEASURES = ("top_eigenvalue", "trace", "ggn_trace", "fisher_rao")


class Cast(nn.Module):
    """A forward pass that turns autocast on by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cnn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@pytest.fixture(scope="module")
def plain():
    return measure(cnn(), nn.CrossEntropyLoss(), BATCHES, MEASURES)


def check(report, plain):
    assert report.conditions["precision"] == "float32 under bfloat16 autocast"
    assert plain.conditions["precision"] == "float32"
    for name in MEASURES:
        assert report[name].value != plain[name].value
        difference = abs(report[name].value - plain[name].value)
        assert difference <= report[name].error < 0.2 * plain[name].value
        assert plain[name].error < 0.02 * report[name].error


def test_autocast_around_a_measurement_is_said_and_counts(plain):
    with torch.autocast("cpu", torch.bfloat16):
        check(measure(cnn(), nn.CrossEntropyLoss(), BATCHES, MEASURES), plain)


def test_autocast_within_a_model_is_said_and_counts(plain):
    check(measure(Cast(), nn.CrossEntropyLoss(), BATCHES, MEASURES), plain)


def test_a_problem_keeps_the_autocast_of_its_making_and_bases_are_not_cast():
    with torch.autocast("cpu", torch.bfloat16):
        problem = Problem(cnn(), nn.CrossEntropyLoss(), BATCHES)
        inside = problem.value()
        ggn = GGN(problem)
        with pytest.raises(ValueError, match="autocast is on around Lanczos"):
            Lanczos(ggn, normal_vector(ggn, 0, 0))
    assert problem.value() == inside != Problem(cnn(), nn.CrossEntropyLoss(), BATCHES).value()
