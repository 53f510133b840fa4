"""Traces, norms and densities against matrices known by heart, and the guard that allows the exact trace."""

import numpy as np
import pytest
import torch
from torch import nn

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import GGN, Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.density import density, effective_dimension
from conadv_lab.sharpness.spectrum.eigen import Lanczos, eigenpairs, normal_vector
from conadv_lab.sharpness.spectrum.exact import exact_trace
from conadv_lab.sharpness.spectrum.trace import (
    Probes,
    controlled_trace,
    deflated_trace,
    frobenius,
    hutch_pp,
    xtrace,
)
from tests.sharpness.conftest import cnn, mlp, ragged_batches, transformer
from tests.sharpness.oracle import difference_hessian

from .test_eigen import Diagonal, network_like


class Dense(Diagonal):
    """The spectrum of ``network_like`` in a random basis, so that signs do not give it away."""

    def __init__(self, values=None, seed=0):
        super().__init__(network_like() if values is None else values)
        basis = torch.linalg.qr(
            torch.randn(self.size, self.size, dtype=self.dtype, generator=torch.Generator().manual_seed(seed))
        ).Q
        self.matrix = (basis * self.values) @ basis.T

    def __matmul__(self, vector):
        return self.matrix @ vector


def test_the_interval_covers_the_truth_in_500_seeds():
    matrix = Dense(np.concatenate([network_like(200), np.full(50, 0.08)]))
    truth = float(matrix.values.sum())
    found = [deflated_trace(matrix, deflate=25, seed=seed) for seed in range(500)]
    covered = [abs(e.value - truth) <= e.error for e in found]
    assert np.mean(covered) >= 0.93
    assert all(e.error <= 0.012 * truth for e in found)
    assert max(e.products for e in found) <= 150


def test_a_control_variate_is_used_where_it_pays():
    first = Dense(np.concatenate([np.linspace(0.5, 1.5, 200), np.linspace(-1, 0, 200)]))
    second = Dense()
    small = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1e-3
    second.matrix = first.matrix + small + small.T
    truth = float(second.matrix.trace())
    run = Lanczos(second, normal_vector(second, 0, 0))
    for _ in range(10):
        run.step()
    probes = Probes(second, run.basis.clone(), 0)
    found = controlled_trace(second, first, float(first.matrix.trace()), run, deflate=10, probes=probes)
    alone = deflated_trace(second, deflate=10)
    assert abs(found.value - truth) <= found.error <= 0.01 * truth
    assert found.products < alone.products / 2


@pytest.mark.parametrize("estimator", [hutch_pp, xtrace])
def test_hutch_pp_and_xtrace_are_unbiased_and_exact_at_full_rank(estimator):
    matrix = Dense(np.sort(np.exp(-np.linspace(0, 9, 60))))
    truth = float(matrix.values.sum())
    found = [estimator(matrix, 60, seed) for seed in range(40)]
    values = np.array([e.value for e in found])
    assert abs(values.mean() - truth) < 5 * values.std() / np.sqrt(40) + 1e-12
    assert values.std() < 0.01 * truth
    assert estimator(Dense(network_like(40)), 120).value == pytest.approx(network_like(40).sum(), abs=1e-9)


def test_frobenius_norm():
    matrix = Dense()
    truth = float(matrix.values.norm())
    run = Lanczos(matrix, normal_vector(matrix, 1, 0))
    for _ in range(30):
        run.step()
    probes = Probes(matrix, run.basis.clone(), 1)
    probes.draw(16)
    found = frobenius(run, probes, 30)
    assert abs(found.value - truth) <= max(found.error, 1e-3 * truth)
    assert frobenius(run, Probes(matrix, run.basis, 1), 30).value < truth


def test_density_moments_band_and_outliers():
    matrix = Dense()
    top = eigenpairs(matrix, 5, tol=1e-8)
    found = density(matrix, known=(top.values, top.vectors), probes=6, steps=20)
    mean, error = found.mean(lambda v: v)
    assert abs(mean - float(matrix.values.mean())) <= 5 * error
    second, error = found.mean(lambda v: v**2)
    assert abs(second - float(matrix.values.square().mean())) <= 5 * error + 1e-6
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-3)
    exact = np.exp(-0.5 * ((found.grid[:, None] - matrix.values.numpy()) / found.sigma) ** 2).mean(1)
    exact /= found.sigma * np.sqrt(2 * np.pi)
    inside = (exact >= found.low - 1e-3 * exact.max()) & (exact <= found.high + 1e-3 * exact.max())
    assert inside.mean() > 0.9
    outlier = np.abs(found.grid - 9) < found.sigma
    np.testing.assert_allclose(found.density[outlier], exact[outlier], rtol=0.01)


def test_effective_dimension_of_a_known_spectrum():
    matrix = Dense(np.concatenate([np.zeros(90), np.full(10, 1e6)]))
    spectrum = density(matrix, probes=2, steps=10)
    weight = [w[n > 1].sum() for n, w in zip(spectrum.nodes, spectrum.weights, strict=True)]
    assert effective_dimension(spectrum, 100, 1.0)[0] == pytest.approx(100 * np.mean(weight), rel=1e-4)


class Residual(nn.Module):
    """Residual sum, padding by strided slicing and grouped convolution, as in small residual networks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x[:, :, :2, :2].repeat(1, 1, 2, 2) + self.norm(self.second(x))).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "criterion"),
    [
        (cnn(), nn.CrossEntropyLoss()),
        (cnn(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (
            mlp(nn.ReLU),
            lambda f, y: f[:, 0].square().mean() + torch.exp(f[:, 1]).mean() - f[:, 2].cos().mean(),
        ),
        (Residual(), nn.CrossEntropyLoss()),
    ],
)
def test_the_exact_trace_is_the_dense_one(model, criterion):
    problem = Problem(model.double(), criterion, ragged_batches("cnn"))
    dense = Hessian(problem, memory_budget=0).dense().diagonal()
    found = exact_trace(problem)
    assert found.refusals == ()
    assert found.value == pytest.approx(float(dense.sum()), abs=1e-10)
    for name, where in problem.slices().items():
        assert found.by_parameter[name] == pytest.approx(float(dense[where].sum()), abs=1e-10)


class Tied(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.inner, self.twice = mlp(nn.ReLU), twice
        self.square = nn.Linear(64, 64)

    def forward(self, x):
        x = self.square(x.flatten(1))
        return self.inner(self.square(x.relu()) if self.twice else x)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp(nn.ReLU)

    def forward(self, x):
        out = self.inner(x)
        return out * out.flip(1)


@pytest.mark.parametrize(
    ("model", "bn", "reason"),
    [
        (mlp(nn.GELU), "eval", "GELU"),
        (mlp(nn.SiLU), "eval", "SiLU"),
        (mlp(nn.Softplus), "eval", "Softplus is not known"),
        (transformer(), "eval", "attention"),
        (transformer(), "eval", "LayerNorm"),
        (Tied(True), "eval", "'square.weight' is tied or reused"),
        (Gate(), "eval", "reaches both sides of a product"),
        (cnn(), "train", "train mode"),
    ],
)
def test_the_exact_trace_is_refused_with_its_reason(model, bn, reason):
    batches = ragged_batches("transformer" if hasattr(model, "embed") else "cnn", torch.float32)
    found = exact_trace(Problem(model, nn.CrossEntropyLoss(), batches, bn=bn))
    assert found.value is None
    assert any(reason in refusal for refusal in found.refusals)


def test_one_use_of_each_weight_is_not_refused():
    assert exact_trace(
        Problem(Tied(False), nn.CrossEntropyLoss(), ragged_batches("mlp", torch.float32))
    ).value


def test_a_known_softmax_of_data_alone_is_no_reason():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(nn.ReLU)

        def forward(self, x):
            return self.inner(nn.functional.gelu(x).softmax(-1))

    assert exact_trace(Problem(Mask(), nn.CrossEntropyLoss(), ragged_batches("mlp", torch.float32))).value


MEASURES = ("trace", "ggn_trace", "frobenius_norm", "layer_traces", "layer_top_eigenvalues")


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_measured_traces_and_layers(name):
    model = cnn() if name == "cnn" else mlp(nn.GELU)
    batches = ragged_batches(name)
    report = measure(model.double(), nn.CrossEntropyLoss(), batches, MEASURES, accuracy=0.1, deflate=20)
    problem = Problem(model, nn.CrossEntropyLoss(), batches)
    dense, ggn = Hessian(problem).dense(), GGN(problem).dense()
    for key, truth in (("trace", dense.trace()), ("ggn_trace", ggn.trace())):
        assert abs(report[key].value - float(truth)) <= 2 * report[key].error + 1e-12
    assert abs(report["frobenius_norm"].value / float(dense.norm()) - 1) < 0.05
    assert (report["trace"].conditions["method"] == "exact") == (name == "cnn")
    slices = problem.slices()
    for layer, value in report["layer_top_eigenvalues"].value.items():
        rows = torch.cat(
            [torch.arange(len(dense))[s] for n, s in slices.items() if n.rpartition(".")[0] == layer]
        )
        block = dense[rows][:, rows]
        assert value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=2e-3, abs=1e-6)
        slack = 2 * report["layer_traces"].error[layer] + 1e-10
        assert abs(report["layer_traces"].value[layer] - float(block.trace())) <= slack


class WritesInPlace(nn.Module):
    """Convolution, norm and linear layers whose outputs are written to, in all the ways that networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hidden, self.fc = nn.Linear(16, 5), nn.Linear(5, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(identity))
        out += identity
        out = nn.functional.max_pool2d(self.relu(out), 2)
        out = nn.functional.relu(self.hidden(out.flatten(1)), inplace=True)
        return self.fc(out).mul_(2)


def test_the_exact_trace_does_not_mind_layers_that_write_into_each_others_outputs():
    """relu_ after a norm once made an exact trace of 23.5, error 0, where 0.65 was right."""
    torch.manual_seed(0)
    model = WritesInPlace()
    for norm in (model.bn1, model.bn2):
        for values in (norm.running_mean, norm.bias.data, norm.weight.data):
            values.normal_()
    x, y = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (6,))
    criterion = nn.CrossEntropyLoss()
    truth = difference_hessian(model, criterion, x, y).diag()
    problem = Problem(model, criterion, [(x[:4], y[:4]), (x[4:], y[4:])])
    found = exact_trace(problem)
    assert found.refusals == ()
    sizes = [p.numel() for p in model.parameters()]
    expected = [float(part.sum()) for part in truth.split(sizes)]
    assert list(found.by_parameter.values()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_weight_used_without_gradients_has_no_exact_trace_of_its_own():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                start = self.two(x)
            return self.two(self.one(start).relu())

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = exact_trace(Problem(Half().double(), nn.CrossEntropyLoss(), [(x, y)]))
    assert found.value is None
    assert "parameter 'two.weight' is used by linear" in found.refusals[0]
