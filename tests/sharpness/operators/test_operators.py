"""Operators against dense truths that share no code with them."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

from conadv_lab.sharpness.operators.matrices import GGN, EmpiricalFisher, Fisher, Hessian
from conadv_lab.sharpness.problem.problem import Problem
from tests.sharpness.conftest import cnn, dense_hessian, mlp, ragged_batches


def per_example_jacobians(model, inputs):
    """(N, outputs, size), each example alone."""
    names = [name for name, _ in model.named_parameters()]
    state = {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())

    def one(parameters, x):
        return functional_call(model, state | parameters, (x[None],))[0]

    jacobians = vmap(jacrev(one), (None, 0))({n: state[n] for n in names}, inputs)
    return torch.cat([jacobians[n].flatten(2) for n in names], 2)


@pytest.mark.parametrize("budget", [0, 2**30, 40_000])
def test_hessian_products_match_the_dense_hessian(subject, budget):
    model, batches = subject
    truth = dense_hessian(model, batches, nn.functional.cross_entropy)
    operator = Hessian(Problem(model, nn.CrossEntropyLoss(), batches), memory_budget=budget)
    vectors = torch.randn(operator.size, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(operator @ vectors, truth @ vectors, atol=1e-10, rtol=1e-10)
    assert operator.products == 6


def test_ggn_and_fishers_match_their_definitions():
    model, batches = cnn().double().eval(), ragged_batches("cnn")
    inputs, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    jacobian = per_example_jacobians(model, inputs)
    p = model(inputs).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    truth = torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / len(inputs)
    residual = p - nn.functional.one_hot(labels, 5)
    gradients = torch.einsum("nci,nc->ni", jacobian, residual)
    problem = Problem(model, nn.CrossEntropyLoss(), batches)
    torch.testing.assert_close(GGN(problem).dense(), truth, atol=1e-8, rtol=0)
    torch.testing.assert_close(Fisher(problem).dense(), truth, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        EmpiricalFisher(problem).dense(), gradients.T @ gradients / len(inputs), atol=1e-8, rtol=0
    )


def test_fisher_is_not_moved_by_label_smoothing():
    batches = ragged_batches("mlp")
    plain = Fisher(Problem(mlp().double(), nn.CrossEntropyLoss(), batches)).dense()
    smoothed = Fisher(Problem(mlp().double(), nn.CrossEntropyLoss(label_smoothing=0.3), batches)).dense()
    torch.testing.assert_close(plain, smoothed, atol=1e-14, rtol=0)


def test_linear_regression_in_closed_form():
    x = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(nn.Linear(4, 1, bias=False).double(), nn.functional.mse_loss, (x, x[:, :1]))
    truth = 2 * x.T @ x / 11
    torch.testing.assert_close(Hessian(problem).dense(), truth)
    torch.testing.assert_close(GGN(problem).dense(), truth)
    torch.testing.assert_close(Fisher(problem, likelihood="gaussian").dense(), truth / 2)


def test_logistic_regression_in_closed_form():
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x[:, :1] > 0).double()
    model = nn.Linear(3, 1, bias=False).double()
    p = torch.sigmoid(model(x)).detach()
    problem = Problem(model, nn.functional.binary_cross_entropy_with_logits, (x, y))
    torch.testing.assert_close(Hessian(problem).dense(), (x * p * (1 - p)).T @ x / 9)


def test_train_mode_batch_norm_is_each_batchs_own():
    model, batches = cnn().double(), ragged_batches("cnn")
    trained = Hessian(Problem(model, nn.CrossEntropyLoss(), batches, bn="train")).dense()
    model_train = copy.deepcopy(model)
    total = torch.zeros_like(trained)
    for x, y in batches:
        named = list(model_train.named_parameters())

        def loss(flat, x=x, y=y, named=named):
            parts = flat.split([p.numel() for _, p in named])
            state = {n: f.view_as(p) for (n, p), f in zip(named, parts, strict=True)}
            return nn.functional.cross_entropy(functional_call(model_train.train(), state, (x,)), y)

        flat = torch.cat([p.detach().reshape(-1) for _, p in named])
        total += torch.autograd.functional.hessian(loss, flat) * len(y) / 21
    torch.testing.assert_close(trained, total, atol=1e-10, rtol=0)


def test_subset_and_inputs_are_blocks_of_the_whole():
    model, batches = mlp().double(), ragged_batches("mlp")
    criterion = nn.CrossEntropyLoss()
    truth = dense_hessian(model, batches, criterion)
    last = Hessian(Problem(model, criterion, batches, params=["3"])).dense()
    torch.testing.assert_close(last, truth[-35:, -35:], atol=1e-12, rtol=0)
    operator = Hessian(Problem(model, criterion, batches), wrt="inputs", memory_budget=0)
    assert operator.size == 21 * 64
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    truth = torch.autograd.functional.hessian(lambda x: criterion(model(x), y), x).reshape(21 * 64, -1)
    vector = torch.randn(21 * 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(operator @ vector, truth @ vector, atol=1e-12, rtol=0)


def test_scipy_sees_the_same_matrix():
    operator = Hessian(Problem(mlp().double(), nn.CrossEntropyLoss(), ragged_batches("mlp")))
    vector = np.linspace(-1, 1, operator.size)
    np.testing.assert_allclose(operator.scipy() @ vector, (operator @ torch.from_numpy(vector)).numpy())


def test_bf16_weights_are_summed_in_float32():
    model, batches = mlp().bfloat16(), ragged_batches("mlp", torch.bfloat16)
    operator = Hessian(Problem(model, nn.CrossEntropyLoss(), batches))
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    exact = Hessian(Problem(model, nn.CrossEntropyLoss(), batches, dtype=torch.float64)) @ vector
    product = operator @ vector
    assert product.dtype == torch.float32
    assert float((product.double() - exact).norm() / exact.norm()) < 0.05


class Breaks(nn.Module):
    """Fails in the second batch, after the first has been through batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cnn()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 6:
            raise RuntimeError("out of luck")
        return self.inner(x)


@pytest.mark.parametrize("bn", ["eval", "train"])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_bit_for_bit(bn, breaks):
    model = Breaks() if breaks else cnn()
    model.train()
    next(model.children()).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 3.0) if index % 2 else None
    before = copy.deepcopy(model)
    data = TensorDataset(
        *(torch.cat(part) for part in zip(*ragged_batches("cnn", torch.float32), strict=True))
    )
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4))
    states = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
        loader.generator.get_state(),
    )
    if breaks:
        problem = Problem(model, nn.CrossEntropyLoss(), loader, bn=bn)
        vectors = torch.ones(problem.size, 4)
        with pytest.raises(RuntimeError, match="out of luck"):
            Hessian(problem, memory_budget=0) @ vectors
    else:
        problem = Problem(model, nn.CrossEntropyLoss(), loader, bn=bn)
        GGN(problem) @ (Hessian(problem) @ torch.ones(problem.size))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(states[3], loader.generator.get_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for index, (old, new) in enumerate(zip(before.parameters(), model.parameters(), strict=True)):
        assert torch.equal(old, new)
        assert torch.equal(new.grad, torch.full_like(new, 3.0)) if index % 2 else new.grad is None
        assert old.requires_grad == new.requires_grad
    for old, new in zip(before.buffers(), model.buffers(), strict=True):
        assert torch.equal(old, new)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_operator_is_a_snapshot():
    model = mlp().double()
    problem = Problem(model, nn.CrossEntropyLoss(), ragged_batches("mlp"))
    kept, rebuilt = Hessian(problem), Hessian(problem, memory_budget=0)
    vector = torch.ones(problem.size, dtype=torch.float64)
    first = kept @ vector
    with torch.no_grad():
        model[1].weight.add_(1.0)
    assert torch.equal(first, kept @ vector)
    assert torch.equal(first, rebuilt @ vector)
