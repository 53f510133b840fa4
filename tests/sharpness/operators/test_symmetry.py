"""Second derivatives that are wrong are found from products that are made anyway, and their place is named."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators import cures
from conadv_lab.sharpness.operators.linear_map import Operator
from conadv_lab.sharpness.operators.matrices import GGN, Hessian
from conadv_lab.sharpness.operators.symmetry import Symmetry
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import Lanczos, normal_vector
from tests.elsewhere import elsewhere
from tests.sharpness.conftest import cnn, mlp, ragged_batches
from tests.sharpness.oracle import difference_hessian
from tests.sharpness.zoo import old_weight_norm, real


class _Unit(torch.autograd.Function):
    """x / ‖x‖, whose backward pass takes the norm for a constant."""

    @staticmethod
    def forward(ctx, x):
        norm = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x, norm)
        return x / norm

    @staticmethod
    def backward(ctx, g):
        x, norm = ctx.saved_tensors
        return g / norm - x * (g * x).sum(1, keepdim=True) / norm**3


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Unit.apply(x)


X, Y = real(20, 4), torch.arange(20) % 3


def wrong() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Unit(), nn.Linear(8, 3)).double()


MEASURES = ("top_eigenvalue", "trace", "layer_traces", "trace_xtrace", "batch_sharpness", "density")


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_second_derivative_is_refused_and_its_module_named(name, dtype):
    with pytest.raises(ValueError, match=r"not symmetric.*suspect: '2' \(Unit\); replace it"):
        measure(wrong(), nn.CrossEntropyLoss(), (X, Y), (name,), dtype=dtype)


def test_what_needs_no_second_derivative_is_measured():
    assert measure(wrong(), nn.CrossEntropyLoss(), (X, Y), ("sam_worst",))["sam_worst"].value[0.05] > 0


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (parametrizations.weight_norm, r"'0.parametrizations.weight.0' \(_WeightNorm\)"),
        (old_weight_norm, r"'0' \(Linear\)"),
    ],
)
def test_weight_norm_without_its_cure_is_found(monkeypatch, wrap, named):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    truth = difference_hessian(model, nn.CrossEntropyLoss(), X, Y)
    found = measure(model, nn.CrossEntropyLoss(), (X, Y), ("trace",))["trace"]
    assert found.value == pytest.approx(float(truth.trace()), abs=2 * found.error)
    monkeypatch.setattr(cures, "CURES", {})
    monkeypatch.setattr("conadv_lab.sharpness.operators.twice.CURES", {})
    with pytest.raises(ValueError, match=f"suspect: {named}"):
        measure(model, nn.CrossEntropyLoss(), (X, Y), ("trace",))


def test_a_loss_that_is_wrong_is_refused_though_no_module_is():
    with pytest.raises(ValueError, match="no single module reproduces it"):
        measure(
            mlp().double(),
            lambda f, y: nn.functional.cross_entropy(5 * _Unit.apply(f), y),
            ragged_batches("mlp"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_rounding_is_not_taken_for_a_fault(dtype, bn):
    hessian = Hessian(Problem(cnn(), nn.CrossEntropyLoss(), ragged_batches("cnn", dtype), dtype=dtype, bn=bn))
    run = Lanczos(hessian, normal_vector(hessian, 0, 0))
    for _ in range(30):
        run.step()
    assert hessian.symmetry.pairs == 2  # of sixteen each
    assert hessian.symmetry.plausible


def test_a_product_that_is_not_finite_is_refused():
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).abs().sqrt() + x

    with pytest.raises(ValueError, match="NaN or infinity"):
        measure(
            nn.Sequential(mlp().double(), Root()),
            nn.CrossEntropyLoss(),
            ragged_batches("mlp"),
            ("sam_worst", "trace"),
        )


def test_the_difference_is_that_of_the_forms():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    u, v = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    checked = Symmetry(2.0**-52)
    checked.note(u, matrix @ u)
    checked.note(v, matrix @ v)
    a, b = float(u @ matrix @ v), float(v @ matrix @ u)
    assert checked.share == pytest.approx(abs(a - b) / (a * a + b * b) ** 0.5)
    assert not checked.plausible


def test_it_costs_no_product_and_leaves_the_callers_vectors(monkeypatch):
    calls: list[Operator] = []
    whole = Operator._sum
    monkeypatch.setattr(Operator, "_sum", lambda self, vector: (calls.append(self), whole(self, vector))[1])
    problem = Problem(cnn(), nn.CrossEntropyLoss(), ragged_batches("cnn", torch.float32))
    for operator in (Hessian(problem), GGN(problem)):
        vector = normal_vector(operator, 0, 0)
        for _ in range(5):  # a power iteration in place
            vector.copy_(operator @ vector).div_(vector.norm())
        assert len(calls) == operator.products == 5
        calls.clear()


def test_a_fault_is_found_wherever_the_default_device_is():
    model = wrong()
    with elsewhere(), pytest.raises(ValueError, match=r"suspect: '2' \(Unit\)"):
        measure(model, nn.CrossEntropyLoss(), (X, Y), ("trace",), dtype=torch.float32)
