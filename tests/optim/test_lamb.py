"""LAMB against its written formulas, torch's Adam for the skip list, and its corner cases."""

import io
from math import sqrt

import pytest
import torch

from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.lamb import LAMB

RATES = [0.1, 0.3, 0.02, 0.02]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(weight, gradients, rates=RATES, **settings):
    param = torch.nn.Parameter(weight.clone())
    optimizer = LAMB([param], lr=1.0, **settings)
    for lr, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = gradient.clone()
        optimizer.step()
    return param.data


def formula(weight, gradients, rates, b1=0.9, b2=0.999, eps=1e-6, d=0.1):
    """Algorithm 2 of You et al. 2020, element by element in Python floats."""
    w = weight.flatten().tolist()
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, (lr, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        g = gradient.flatten().tolist()
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True)]
        u = [a / (1 - b1**t) / (sqrt(b / (1 - b2**t)) + eps) for a, b in zip(m, v, strict=True)]
        u = [a + d * b for a, b in zip(u, w, strict=True)]
        ratio = sqrt(sum(a * a for a in w)) / sqrt(sum(a * a for a in u))
        w = [a - lr * ratio * b for a, b in zip(w, u, strict=True)]
    return torch.tensor(w, dtype=torch.float64).reshape(weight.shape)


def test_equals_the_written_formulas_while_the_rate_changes():
    weight, gradients = random(4, 3, 3, 3), [random(4, 3, 3, 3, seed=step + 1) for step in range(len(RATES))]
    expected = formula(weight, gradients, RATES)
    torch.testing.assert_close(run(weight, gradients, weight_decay=0.1), expected, rtol=1e-12, atol=1e-12)


def test_skipped_groups_are_torchs_adam():
    model = torch.nn.Linear(3, 5).double()
    twin = torch.nn.Parameter(model.bias.detach().clone())
    ours = LAMB(parameter_groups(model, 0.1), lr=0.01)
    reference = torch.optim.Adam([twin], lr=0.01, eps=1e-6)
    for step in range(4):
        twin.grad = model.bias.grad = random(5, seed=step)
        ours.step()
        reference.step()
    torch.testing.assert_close(model.bias, twin, rtol=1e-12, atol=1e-12)


def test_zero_weight_takes_adams_step_and_zero_update_none():
    gradient = random(4, 4)
    moved = run(torch.zeros(4, 4, dtype=torch.float64), [gradient], [0.1], weight_decay=0.0)
    torch.testing.assert_close(moved, -0.1 * gradient.sign(), rtol=1e-3, atol=0)
    weight = random(4, 4)
    assert torch.equal(run(weight, [torch.zeros_like(weight)], [0.1], weight_decay=0.0), weight)


def test_length_of_a_step_is_that_of_the_weight():
    weight = random(8, 8)
    moved = run(weight, [random(8, 8, seed=1)], [0.25])
    assert (moved - weight).norm().item() == pytest.approx(0.25 * weight.norm().item())


def test_resumes_bitwise_through_its_state():
    gradients = [random(5, 5, seed=step).float() for step in range(6)]
    straight = run(random(5, 5).float(), gradients, [0.1] * 6)
    param = torch.nn.Parameter(random(5, 5).float())
    optimizer = LAMB([param], lr=0.1)
    for step, gradient in enumerate(gradients):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            param = torch.nn.Parameter(param.data.clone())
            optimizer = LAMB([param], lr=9.9)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        param.grad = gradient
        optimizer.step()
    assert torch.equal(param, straight)


def test_reads_nothing_back_from_the_device():
    param = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = LAMB([param], lr=1.0)
    optimizer.step()
    assert optimizer.state[param]["mean"].is_meta


@pytest.mark.parametrize(
    ("setting", "value"), [("lr", -1.0), ("eps", 0.0), ("weight_decay", -0.1), ("betas", (0.9, 1.0))]
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is .*; allowed: (a number|numbers) "):
        LAMB([torch.nn.Parameter(torch.ones(2))], **{"lr": 1.0, setting: value})
