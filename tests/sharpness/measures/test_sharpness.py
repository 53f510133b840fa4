"""Sharpness against closed forms, and what a rescaling of the layers does to each measure."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from conadv_lab.sharpness.measures.average import average_rise, magnitude_width
from conadv_lab.sharpness.measures.front import measure, names
from conadv_lab.sharpness.measures.gradients import noise_scale
from conadv_lab.sharpness.measures.keskar import keskar_sharpness
from conadv_lab.sharpness.measures.study import RESCALING
from conadv_lab.sharpness.measures.worst import ascend
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from tests.sharpness.conftest import cnn, mlp, ragged_batches


def regression_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator) * torch.arange(1, 7)
    y = torch.randn(40, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, (x, y), 2 * x.T @ x / 40


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_of_a_quadratic(adaptive):
    model, batch, hessian = regression_at_its_minimum()
    problem = Problem(model, mse_loss, batch)
    c = problem.weights().abs() if adaptive else torch.ones(6, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(c[:, None] * hessian * c)[-1])
    for rho in (0.01, 1.0):
        found = ascend(problem, rho, c, steps=60)
        assert found.rise == pytest.approx(rho**2 / 2 * top, rel=1e-3)
        assert float(found.point.norm()) <= rho * (1 + 1e-12)


def test_averages_of_a_quadratic():
    model, batch, hessian = regression_at_its_minimum()
    report = measure(model, mse_loss, batch, ("sam_average", "adaptive_average"), draws=200)
    weights = Problem(model, mse_loss, batch).weights()
    for rho in (0.05, 0.1, 0.2):
        truth = rho**2 / 12 * float(hessian.trace())
        found = report["sam_average"]
        assert abs(found.value[rho] - truth) <= 1.5 * found.error[rho] < 0.3 * truth
    for rho in (0.05, 0.1):
        truth = rho**2 / 2 * float((weights**2 * hessian.diagonal()).sum())
        found = report["adaptive_average"]
        assert abs(found.value[rho] - truth) <= 1.5 * found.error[rho] < 0.5 * truth


@pytest.mark.parametrize("name", [n for n in names() if "worst" in n])
def test_worst_case_grows_with_rho_and_is_not_below_one_step(name):
    batches = ragged_batches("cnn", torch.float32)
    radii = (0.01, 0.1, 0.5, 1.0, 3.0)
    found = measure(
        cnn(), nn.CrossEntropyLoss(), batches, (name,), rhos=radii, adaptive_rhos=radii, ascent_steps=3
    )
    values = [found[name].value[r] for r in radii]
    assert all(a <= b for a, b in itertools.pairwise(values))
    for rho, one_step in found[name].conditions["one_step"].items():
        assert found[name].value[rho] >= one_step


def rescaled(factor):
    """The same function with its first layer times ``factor`` and its second divided by it."""
    model = mlp(nn.ReLU).double()
    with torch.no_grad():
        model[1].weight.mul_(factor)
        model[1].bias.mul_(factor)
        model[3].weight.div_(factor)
    return model


def numbers(value):
    if isinstance(value, dict):
        return np.concatenate([numbers(v) for v in value.values()])
    return np.concatenate([numbers(v) for v in value]) if isinstance(value, list) else np.array([value])


NOT_HERE = (
    "density",  # a curve
    "gradient_noise_scale",  # of no meaning on three batches
    "pac_bayes_flatness_magnitude",  # moves with weights below 0.001, of which there are none here
)


@pytest.mark.parametrize("name", [n for n in names() if n not in NOT_HERE])
def test_what_a_rescaling_does_is_what_is_said(name):
    inputs = [x.sigmoid() for x, _ in ragged_batches("mlp")]
    batches = [(x, rescaled(1.0)(x).argmax(1)) for x in inputs]
    values = [
        numbers(
            measure(
                rescaled(factor), nn.CrossEntropyLoss(), batches, (name,), facts={"learning_rate": 0.1},
                draws=4, ascent_steps=3, epsilon=0.01, tol=1e-6, accuracy=0.05,
            )[name].value
        )
        for factor in (1.0, 8.0)
    ]  # fmt: skip
    change = np.abs(values[1] - values[0]).max() / np.abs(values[0]).max()
    assert change < 1e-6 if RESCALING[name] == "unchanged" else change > 1e-3


def test_the_last_layers_scale_has_no_effect_on_normalised_logits():
    def value(factor, name):
        model = mlp(nn.ReLU).double()
        with torch.no_grad():
            model[3].weight.mul_(factor)
            model[3].bias.mul_(factor)
        return measure(model, nn.CrossEntropyLoss(), ragged_batches("mlp"), (name,))[name].value[0.5]

    assert value(3.0, "adaptive_worst_logit_normalised") == pytest.approx(
        value(1.0, "adaptive_worst_logit_normalised"), rel=1e-9
    )
    assert value(3.0, "adaptive_worst") > 1.5 * value(1.0, "adaptive_worst")


def test_keskar_in_closed_form():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
    batch = (torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    problem = Problem(model, mse_loss, batch)  # f(w) = w², the highest point is the corner w + ε(|w| + 1)
    for epsilon in (1e-3, 5e-4):
        truth = 100 * ((2 + 3 * epsilon) ** 2 - 4) / (1 + 4)
        assert keskar_sharpness(problem, epsilon)[0] == pytest.approx(truth, rel=1e-9)
        assert keskar_sharpness(problem, epsilon, 1)[0] == pytest.approx(truth, rel=1e-9)


def test_keskars_box_is_that_of_its_dual_norm():
    """Away from a minimum the loss is linear in a small box, whose highest corner is known."""
    problem = Problem(mlp().double(), nn.CrossEntropyLoss(), ragged_batches("mlp"))
    g, w = problem.gradient, problem.weights()
    for epsilon in (1e-7, 1e-6):
        corner = float((g.abs() * (w.abs() + 1)).sum())
        truth = 100 * epsilon * corner / (1 + problem.initial_loss)
        assert keskar_sharpness(problem, epsilon)[0] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.01, 0.03])
def test_magnitude_aware_noise_has_the_second_order_rise_of_its_variance(sigma):
    problem = Problem(mlp().double(), nn.CrossEntropyLoss(), ragged_batches("mlp"))
    diagonal, w = Hessian(problem).dense().diagonal(), problem.weights()
    width = magnitude_width(w, sigma)
    value, error = average_rise(problem, lambda z: width * z, draws=800, confidence=0.99, seed=0)
    truth = float(((sigma**2 * w.square() + 1e-6) * diagonal).sum()) / 2
    assert abs(value - truth) <= 1.2 * error
    assert error < 0.25 * abs(truth)


def test_batch_sharpness_and_fisher_rao_against_dense_matrices():
    model, batches = mlp().double(), ragged_batches("mlp")
    report = measure(model, nn.CrossEntropyLoss(), batches, ("batch_sharpness", "fisher_rao"))
    values = []
    for batch in batches:
        problem = Problem(model, nn.CrossEntropyLoss(), batch)
        g = problem.gradient
        values.append(float(g @ Hessian(problem).dense() @ g / (g @ g)))
    assert report["batch_sharpness"].value == pytest.approx(np.average(values, weights=[8, 8, 5]), rel=1e-9)
    assert report["batch_sharpness"].error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3), rel=1e-9)
    weights, total = Problem(model, nn.CrossEntropyLoss(), batches).weights(), 0.0
    x = torch.cat([x for x, _ in batches])

    def outputs(flat):
        named = [n for n, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(named, problem.split(flat), strict=True)), (x,))

    _, along = torch.func.jvp(outputs, (weights,), (weights,))
    p = outputs(weights).softmax(1)
    total = float(((p * along**2).sum(1) - (p * along).sum(1) ** 2).mean())
    assert report["fisher_rao"].value == pytest.approx(total, rel=1e-9)


def test_gradient_noise_scale_of_known_gradients():
    generator = torch.Generator().manual_seed(0)
    signal, spread, sizes = torch.full((200,), 0.3), 2.0, [8] * 300 + [5] * 300
    groups = [signal + spread * torch.randn(200, generator=generator) / b**0.5 for b in sizes]
    whole = sum(g * b for g, b in zip(groups, sizes, strict=True)) / sum(sizes)
    found = noise_scale(sizes, [float(g.square().sum()) for g in groups], float(whole.square().sum()))
    assert found == pytest.approx(200 * spread**2 / float(signal.square().sum()), rel=0.05)


def test_input_measures_of_a_linear_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    x = torch.rand(50, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    y = model(x).argmax(1)
    report = measure(
        model,
        nn.CrossEntropyLoss(),
        (x, y),
        ("input_sharpness", "fgsm_accuracy", "pgd_accuracy"),
        epsilon=0.05,
    )
    difference = (model[1].weight[0] - model[1].weight[1]).detach()
    p = model(x).softmax(1).detach()
    other = 1 - p.gather(1, y[:, None])[:, 0]
    assert report["input_sharpness"].value == pytest.approx(
        float((other * difference.norm()).mean()), rel=1e-9
    )
    scores = model(x).detach()
    margin = (scores[:, 0] - scores[:, 1]).abs()
    truth = float((margin > 0.05 * difference.abs().sum()).double().mean())
    assert 0 < truth < 1
    assert report["fgsm_accuracy"].value == pytest.approx(100 * truth)
    # Ten steps reach the corner from any start.
    assert report["pgd_accuracy"].value == pytest.approx(100 * truth)
    assert report["pgd_accuracy"].error == pytest.approx(100 * (truth * (1 - truth) / 50) ** 0.5)


REFUSED = {
    "pgd_accuracy": ({}, "within"),
    "lr_lambda_max": ({}, "facts"),
    "gradient_noise_scale": ({"m": 21, "batches": [ragged_batches("mlp", torch.float32)[0]]}, "at least 3"),
    "sam_worst": ({"rhos": (0.0,)}, "above 0"),
    "keskar": ({"keskar_epsilons": (-1.0,)}, "above 0"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_measured_is_refused(name):
    change, told = REFUSED[name]
    change = dict(change)
    batches = change.pop("batches", ragged_batches("mlp", torch.float32))
    with pytest.raises(ValueError, match=told):
        measure(mlp(), nn.CrossEntropyLoss(), batches, (name,), **change)


def test_pac_bayes_noise_costs_a_tenth_of_accuracy():
    torch.manual_seed(0)
    model, batches = mlp(nn.ReLU), ragged_batches("mlp", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    found = measure(model, nn.CrossEntropyLoss(), batches, ("pac_bayes_flatness",), draws=16)[
        "pac_bayes_flatness"
    ]
    assert found.conditions["accuracy"] == 1.0
    problem, right = Problem(model, nn.CrossEntropyLoss(), batches), []
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    generator = torch.Generator().manual_seed(9)
    for _ in range(300):
        noise = torch.randn(problem.size, generator=generator) * found.value**-0.5
        parts = problem.split(problem.weights() + noise)
        right.append(float((problem.outputs(parts, x).argmax(1) == y).double().mean()))
    assert np.mean(right) == pytest.approx(0.9, abs=0.04)
