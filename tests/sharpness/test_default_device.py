"""Measuring a model that is not on the default device: every measure, the cross-check, a line, and resuming."""

import pytest
import torch
from torch import nn

from conadv_lab.sharpness import measure
from conadv_lab.sharpness.measures.front import names
from conadv_lab.sharpness.measures.landscape import line_to
from conadv_lab.sharpness.operators.matrices import GGN, EmpiricalFisher, Fisher, Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import cross_check, side_by_side
from conadv_lab.sharpness.spectrum.eigen import Lanczos, eigenpairs, normal_vector
from conadv_lab.sharpness.spectrum.journal import Journal
from tests.elsewhere import elsewhere

from .conftest import QUICK, fitted


@pytest.fixture(scope="module")
def subjects():
    """Of the first traces are exact, of the second they are drawn."""
    return {"ReLU": fitted(), "GELU": fitted(nn.GELU)}


def measured(subject, name: str, **more):
    model, batches = subject
    told = {"learning_rate": 0.1}
    return measure(model, nn.CrossEntropyLoss(), batches, (name,), facts=told, **QUICK | more)[name]


@pytest.mark.parametrize("network", ["ReLU", "GELU"])
@pytest.mark.parametrize("name", names())
def test_measures(name, network, subjects):
    with elsewhere():
        found = measured(subjects[network], name)
    assert found.value == measured(subjects[network], name).value


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher, EmpiricalFisher])
def test_operators(kind, subjects):
    model, batches = subjects["GELU"]
    with elsewhere():
        problem = Problem(model, nn.CrossEntropyLoss(), batches)
        operator, images = kind(problem), Hessian(problem, wrt="inputs", planned=1)
        vector = normal_vector(operator, 0, 0)
        product, dense = operator.scipy() @ vector.numpy(), operator.dense()
        assert images @ normal_vector(images, 0, 0) is not None
    torch.testing.assert_close(torch.from_numpy(product), dense @ vector, rtol=1e-4, atol=1e-5)


def test_a_linear_loss(subjects):
    """Whose second derivative in the outputs is made and not computed."""
    model, batches = subjects["ReLU"]
    with elsewhere():
        report = measure(model, lambda output, targets: output.mean(), batches, ("ggn_trace",))
    assert report["ggn_trace"].value == 0


def test_an_eigenvalue_that_the_first_start_missed():
    """The identity's second eigenvector is found from a second start, and put in its place."""

    class Identity:
        size, dtype, device = 6, torch.float64, torch.device("cpu")

        def __matmul__(self, vector):
            return 2 * vector

    with elsewhere():
        found = eigenpairs(Identity(), 2)
    assert found.values.tolist() == pytest.approx([2, 2])


def test_the_cross_check(subjects):
    model, batches = subjects["ReLU"]
    with elsewhere():
        report = measure(model, nn.CrossEntropyLoss(), batches, ("top_eigenvalue", "trace"))
        problem = Problem(model, nn.CrossEntropyLoss(), batches)
        check = cross_check(problem, samples=3)
        rows = side_by_side(report, check)
    assert check.product_difference < 1e-5
    assert len(rows) == 3


def test_a_line_to_another_solution(subjects):
    model, batches = subjects["ReLU"]
    with elsewhere():
        problem = Problem(model, nn.CrossEntropyLoss(), batches)
        report = measure(model, nn.CrossEntropyLoss(), batches, ("sam_average",), draws=2)
        found = line_to(report, problem, problem, "itself", points=3)
    assert found["landscape_between"].value["losses"] == pytest.approx([problem.initial_loss] * 3)


@pytest.mark.parametrize("name", ["density", "trace", "landscape_line"])
def test_resuming(name, subjects, tmp_path, monkeypatch):
    """From a folder in which every part is kept as soon as it is made."""
    monkeypatch.setattr(Journal, "due", property(lambda self: self.folder is not None))
    with elsewhere():
        first = measured(subjects["GELU"], name, resume=tmp_path)
        (tmp_path / f"measure-{name}.pt").unlink()
        assert list(tmp_path.glob("*.pt"))
        again = measured(subjects["GELU"], name, resume=tmp_path)
    assert again.value == first.value


def test_a_lanczos_run_goes_on_from_its_state(subjects):
    model, batches = subjects["ReLU"]
    with elsewhere():
        operator = Hessian(Problem(model, nn.CrossEntropyLoss(), batches))
        run = Lanczos(operator, normal_vector(operator, 0, 0))
        run.step()
        other = Lanczos(operator, normal_vector(operator, 0, 1))
        other.restore(run.state())
        other.step()
        run.step()
    assert other.alphas == run.alphas
