"""PyHessian agrees, and leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import cross_check, pyhessian
from conadv_lab.sharpness.spectrum.eigen import eigenpairs
from tests.sharpness.conftest import cnn, mlp, ragged_batches


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("params", [None, ["8"]])
def test_one_product_is_pyhessians(streamed, params):
    batches = ragged_batches("cnn", torch.float32)
    problem = Problem(cnn(), nn.CrossEntropyLoss(), batches if streamed else batches[0], params=params)
    found = cross_check(problem, samples=20)
    assert found.product_difference < 1e-5
    ours = eigenpairs(Hessian(problem), tol=1e-6).values[0]
    assert found.top_eigenvalue == pytest.approx(ours, rel=1e-2)


def test_it_leaves_nothing_behind():
    model = cnn().train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    problem = Problem(model, nn.CrossEntropyLoss(), ragged_batches("cnn", torch.float32)[0])
    first, second = (cross_check(problem, samples=5) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(new.grad, torch.ones_like(new))
    with pyhessian(problem) as theirs:
        pass
    assert all(p.grad is None for p in theirs.model.parameters())


def test_train_mode_is_refused():
    problem = Problem(mlp(), nn.CrossEntropyLoss(), ragged_batches("mlp", torch.float32), bn="train")
    with pytest.raises(ValueError, match="PyHessian's only mode"):
        cross_check(problem)


def test_one_product_is_curvlinops():
    curvlinops = pytest.importorskip(
        "curvlinops", reason="curvlinops is not installed; it is compared by hand and by the benchmark"
    )
    model, batches = cnn().eval(), ragged_batches("cnn", torch.float32)
    problem = Problem(model, nn.CrossEntropyLoss(), batches)
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), [*model.parameters()], batches)
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
    ours = Hessian(problem) @ vector
    assert float((ours - theirs @ vector).norm() / ours.norm()) < 1e-5


def test_a_negative_trace_has_as_many_samples_as_any_other():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    problem = Problem(nn.Linear(4, 3), lambda outputs, y: -nn.functional.cross_entropy(outputs, y), (x, y))
    found = cross_check(problem, samples=20)
    assert found.samples == 20
    truth = float(Hessian(problem).dense().trace())
    assert abs(found.trace - truth) < 5 * found.trace_error
    assert truth < 0
