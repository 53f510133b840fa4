"""Eigenpairs against dense float64 truths."""

import numpy as np
import pytest
import torch
from torch import nn

from conadv_lab.sharpness import Hessian, Lanczos, Problem, eigenpairs, measure
from conadv_lab.sharpness.spectrum.eigen import normal_vector
from tests.sharpness.conftest import cnn, dense_hessian, mlp, ragged_batches


class Diagonal:
    """A matrix known by heart."""

    def __init__(self, values, dtype=torch.float64):
        self.values = torch.as_tensor(np.asarray(values), dtype=dtype)
        self.size, self.dtype, self.device = len(self.values), dtype, torch.device("cpu")
        self.products = 0

    def __matmul__(self, vector):
        self.products += 1
        return self.values * vector


def network_like(size=400):
    """A bulk near zero with some outliers and a few negative values, as networks have."""
    rng = np.random.default_rng(0)
    return np.sort(np.concatenate([rng.normal(0, 0.05, size - 8), [9, 6, 4.5, 3, 2.2, 1.5, 1.0, -0.6]]))


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_eigenvalues_of_networks_to_1e_6(subject, end):
    model, batches = subject
    truth = np.linalg.eigvalsh(dense_hessian(model, batches, nn.functional.cross_entropy).numpy())
    truth = truth[::-1] if end == "top" else truth
    found = eigenpairs(Hessian(Problem(model, nn.CrossEntropyLoss(), batches)), 4, end=end, tol=1e-7)
    np.testing.assert_allclose(found.values, truth[:4], atol=1e-6)
    assert found.converged


def test_bounds_are_not_below_the_true_error_in_200_seeds():
    values = network_like()
    truth = values[::-1][:5]
    products = []
    for seed in range(200):
        found = eigenpairs(Diagonal(values), 5, seed=seed, check=False)
        assert found.converged
        assert (np.abs(found.values - truth) <= found.bounds).all()
        assert (np.abs(found.values - truth) <= 1e-3 * truth).all()
        products.append(found.products)
    assert np.median(products) <= 20


def test_vectors_and_residuals_are_what_they_say():
    operator = Diagonal(network_like())
    found = eigenpairs(operator, 3, check=False)
    images = torch.stack([operator @ v for v in found.vectors])
    residuals = (images - torch.from_numpy(found.values.copy())[:, None] * found.vectors).norm(dim=1)
    np.testing.assert_allclose(residuals, found.residuals, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3, dtype=torch.float64))


def test_the_second_start_finds_a_repeated_eigenvalue():
    values = np.concatenate([np.linspace(-1, 1, 300), [8.0, 8.0, 8.0, 5.0]])
    alone = eigenpairs(Diagonal(values), 2, check=False)
    checked = eigenpairs(Diagonal(values), 2)
    assert alone.values[1] < 5.1
    np.testing.assert_allclose(checked.values, [8, 8], rtol=1e-3)
    assert 0 < checked.check_products < checked.products


@pytest.mark.parametrize("values", [[2.0], [3.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0]])
def test_small_and_degenerate_matrices_are_exact(values):
    operator = Diagonal(values)
    found = eigenpairs(operator, len(values))
    np.testing.assert_allclose(found.values, sorted(values, reverse=True), atol=1e-12)
    assert operator.products == found.products


def test_a_restored_run_goes_on_with_the_same_bits():
    whole = Lanczos(Diagonal(network_like()), normal_vector(Diagonal(network_like()), 3, 0))
    half = Lanczos(Diagonal(network_like()), normal_vector(Diagonal(network_like()), 3, 0))
    for _ in range(20):
        whole.step()
    for _ in range(9):
        half.step()
    again = Lanczos(Diagonal(network_like()), torch.ones(400))
    again.restore(half.state())
    for _ in range(11):
        again.step()
    assert again.alphas == whole.alphas
    assert again.betas == whole.betas


def test_measure_carries_everything():
    wanted = ("top_eigenvalue", "top_eigenvalues", "bottom_eigenvalue")
    report = measure(
        cnn(),
        nn.CrossEntropyLoss(),
        ragged_batches("cnn", torch.float32),
        wanted,
        k=3,
        facts={"split": "train"},
    )
    truth = np.linalg.eigvalsh(
        dense_hessian(cnn().double(), ragged_batches("cnn"), nn.functional.cross_entropy).numpy()
    )
    top = report["top_eigenvalue"]
    assert abs(top.value - truth[-1]) <= top.error + 1e-6
    np.testing.assert_allclose(report["top_eigenvalues"].value, truth[::-1][:3], rtol=1e-3)
    assert abs(report["bottom_eigenvalue"].value - truth[0]) <= report["bottom_eigenvalue"].error + 1e-6
    assert top.conditions["examples"] == 21
    assert top.conditions["split"] == "train"
    assert top.conditions["bn"] == "eval"


def test_same_seed_same_bits():
    def values(seed):
        return measure(mlp(), nn.CrossEntropyLoss(), ragged_batches("mlp", torch.float32), seed=seed, k=2)

    first, second = values(5), values(5)
    assert [m.value for m in first.measures] == [m.value for m in second.measures]
    assert first["top_eigenvalue"].error != values(6)["top_eigenvalue"].error
