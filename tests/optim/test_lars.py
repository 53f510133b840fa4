"""LARS against its written formulas in float64, and against the bugs known from other implementations."""

import io
from math import sqrt

import pytest
import torch

from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.lars import LARS

RATES = [0.3, 1.7, 5.0, 5.0, 2.0, 0.4, 0.01]


def tensors(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def run(weights, gradients, rates=RATES, **settings):
    """The weights after one step a rate; gradients: one list of tensors a step."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = LARS(params, lr=1.0, **settings)
    for lr, grads in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.data for param in params]


def formula(variant, weight, gradients, rates=RATES, m=0.9, d=0.01, eta=0.02, eps=1e-8, clamp=50.0):
    """The written formulas, element by element in Python floats."""
    w, v, before = weight.flatten().tolist(), [0.0] * weight.numel(), rates[0]
    for lr, grad in zip(rates, gradients, strict=True):
        g = grad.flatten().tolist()
        norm_w, norm_g = sqrt(sum(x * x for x in w)), sqrt(sum(x * x for x in g))
        ratio = eta * norm_w / (norm_g + d * norm_w + (0 if variant == "B'" else eps))
        for i in range(len(w)):
            pull = g[i] + d * w[i]
            if variant == "A":
                v[i] = m * v[i] + lr * ratio * pull
                w[i] -= v[i]
            elif variant == "B":
                v[i] = m * v[i] + ratio * pull
                w[i] -= lr * v[i]
            elif variant == "B'":
                v[i] = m * lr / before * v[i] + lr * ratio * pull
                w[i] -= v[i]
            elif variant == "C":
                v[i] = m * v[i] + pull
                w[i] -= lr * min(ratio, clamp) * v[i]
        before = lr
    return torch.tensor(w, dtype=torch.float64).reshape(weight.shape)


SHAPES = [(4, 3, 3, 3), (5, 7), (11,), ()]
SETTINGS = {"weight_decay": 0.01, "trust_coefficient": 0.02}


@pytest.fixture
def problem():
    return tensors(*SHAPES), [tensors(*SHAPES, seed=step + 1) for step in range(len(RATES))]


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_equals_the_written_formulas_while_the_rate_changes(variant, problem):
    weights, gradients = problem
    results = run(weights, gradients, variant=variant, **SETTINGS)
    for i, (weight, result) in enumerate(zip(weights, results, strict=True)):
        expected = formula(variant, weight, [grads[i] for grads in gradients])
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_variants_differ_once_the_rate_changes(problem):
    a, b, c = (run(*problem, variant=variant, **SETTINGS)[0] for variant in "ABC")
    for one, other in ((a, b), (a, c), (b, c)):
        assert (one - other).norm() > 1e-3 * one.norm()


def test_b_equals_the_winners_form_while_the_rate_is_positive(problem):
    weights, gradients = problem
    result = run(weights, gradients, variant="B", eps=0.0, **SETTINGS)[0]
    expected = formula("B'", weights[0], [grads[0] for grads in gradients])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_default_is_b(problem):
    assert torch.equal(run(*problem)[0], run(*problem, variant="B")[0])


def test_clamp_limits_the_ratio_of_c_alone():
    weight, gradient = torch.full((2, 2), 10.0), torch.full((2, 2), 1e-3)
    settings = {"weight_decay": 0.0, "trust_coefficient": 1.0, "rates": [0.1]}
    steps = {v: weight - run([weight], [[gradient]], variant=v, clamp=7.0, **settings)[0] for v in "ABC"}
    torch.testing.assert_close(steps["C"], 0.1 * 7.0 * gradient, rtol=1e-3, atol=0)
    for variant in "AB":
        torch.testing.assert_close(steps[variant], 0.1 * weight, rtol=1e-3, atol=0)
    unclamped = run([weight], [[gradient]], variant="C", clamp=1e9, **settings)[0]
    torch.testing.assert_close(weight - unclamped, 0.1 * weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_first_step_without_decay_has_the_length_of_the_formula(variant, scale):
    """Fails for a velocity that starts at the raw gradient, and where LARS is off without weight decay."""
    weight, gradient = tensors((30, 20), dtype=torch.float32)[0], tensors((30, 20), seed=1)[0].float()
    moved = run([weight], [[gradient * scale]], [3.0], variant=variant, weight_decay=0.0)[0]
    assert (moved - weight).norm().item() == pytest.approx(3.0 * 0.001 * weight.norm().item(), rel=0.01)


def test_weight_decay_is_part_of_the_ratio():
    """Fails for a ratio without d ‖w‖ in the denominator: that one would step twice as far here."""
    weight, gradient = torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 1.0, dtype=torch.float64)
    moved = run([weight], [[gradient]], [1.0], weight_decay=0.5, trust_coefficient=0.1)[0]
    torch.testing.assert_close(
        weight - moved, torch.full_like(weight, 0.1 * 4 / (2 + 0.5 * 4) * (1 + 0.5 * 2))
    )


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_zero_weight_takes_a_plain_step(variant):
    gradient = tensors((3, 4))[0]
    moved = run([torch.zeros(3, 4, dtype=torch.float64)], [[gradient]], [0.5], variant=variant)[0]
    torch.testing.assert_close(moved, -0.5 * gradient)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_zero_gradient_takes_a_plain_step_of_decay(variant):
    weight = tensors((3, 4))[0]
    zero = torch.zeros_like(weight)
    moved = run([weight], [[zero]], [0.5], variant=variant, weight_decay=0.1)[0]
    torch.testing.assert_close(moved, weight * (1 - 0.5 * 0.1))
    assert torch.equal(run([weight], [[zero]], [0.5], variant=variant, weight_decay=0.0)[0], weight)


def test_both_zero_stay_zero():
    zero = torch.zeros(3, 4)
    assert torch.equal(run([zero], [[zero]] * 2, [0.5, 0.5])[0], zero)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_skipped_groups_are_torchs_momentum_sgd(variant):
    """At a constant rate, at which all variants agree with torch."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    skipped = [model[0].bias, model[1].weight, model[1].bias]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in skipped]
    ours = LARS(parameter_groups(model, 0.1), lr=0.5, variant=variant)
    reference = torch.optim.SGD(twins, lr=0.5, momentum=0.9)
    for step in range(4):
        for param, twin in zip(skipped, twins, strict=True):
            twin.grad = param.grad = tensors(param.shape, seed=step, dtype=torch.float32)[0]
        ours.step()
        reference.step()
    assert not torch.equal(model[0].bias, torch.zeros(4))
    for param, twin in zip(skipped, twins, strict=True):
        torch.testing.assert_close(param, twin)


def test_skipped_group_has_no_decay_unless_it_names_one():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [first], "adapt": False}, {"params": [second], "adapt": False, "weight_decay": 0.1}]
    optimizer = LARS(groups, lr=1.0, weight_decay=0.5)
    first.grad, second.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert first.tolist() == [1.0] * 3
    assert second.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_resumes_bitwise_through_its_state(variant):
    weights = tensors((40, 30), (40,), dtype=torch.float32)

    def train(params, optimizer, steps):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
            for i, param in enumerate(params):
                param.grad = tensors(param.shape, seed=10 * step + i, dtype=torch.float32)[0]
            optimizer.step()

    def start(values):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        return params, LARS(params, lr=9.9, variant=variant)

    straight, optimizer = start(weights)
    train(straight, optimizer, range(6))
    params, optimizer = start(weights)
    train(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params, optimizer = start([param.data for param in params])
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(params, optimizer, range(3, 6))
    for param, expected in zip(params, straight, strict=True):
        assert torch.equal(param, expected)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_bfloat16_stays_near_float32(variant):
    weights, gradients = (
        tensors((64, 32), dtype=torch.float32),
        [tensors((64, 32), seed=1, dtype=torch.float32)],
    )
    exact = run(weights, gradients, [10.0], variant=variant)[0] - weights[0]
    coarse = run([w.bfloat16() for w in weights], [[g.bfloat16() for g in gs] for gs in gradients], [10.0])[0]
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - weights[0] - exact).norm() < 2**-8 * weights[0].norm()
    assert exact.norm() > 2 * 2**-8 * weights[0].norm()


def test_cuts_and_memory_formats_change_nothing(monkeypatch):
    shapes = [(50, 20, 3, 3), (7, 5), (3,), (), (0, 4)]
    weights, gradients = tensors(*shapes), [tensors(*shapes, seed=1), tensors(*shapes, seed=2)]
    whole = run(weights, gradients, [1.0, 2.0])
    monkeypatch.setattr("conadv_lab.optim.tensors._BLOCK", 400)
    cut = run(weights, gradients, [1.0, 2.0])
    last = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    permuted = run(last, gradients, [1.0, 2.0])
    assert permuted[0].is_contiguous(memory_format=torch.channels_last)
    for one, other, third in zip(whole, cut, permuted, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third, rtol=1e-12, atol=1e-12)


def test_gradients_are_only_read_and_missing_ones_skipped():
    params = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = LARS(params, lr=1.0, weight_decay=0.1)
    params[0].grad = torch.full((3, 3), 2.0)
    optimizer.step()
    assert torch.equal(params[0].grad, torch.full((3, 3), 2.0))
    assert not torch.equal(params[0], torch.ones(3, 3))
    assert torch.equal(params[1], torch.ones(3, 3))


def test_closure_runs_with_gradients_on():
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([param], lr=1.0)

    def closure():
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert param.max() < 1


def test_reads_nothing_back_from_the_device():
    """On the meta device any read of a value raises, as a host synchronisation on CUDA would wait."""
    for variant in "ABC":
        params = [torch.nn.Parameter(torch.empty(4, 3, device="meta")) for _ in range(2)]
        optimizer = LARS(
            [{"params": params[:1]}, {"params": params[1:], "adapt": False}], 1.0, variant=variant
        )
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        assert optimizer.state[params[0]]["velocity"].is_meta
        with pytest.raises((RuntimeError, NotImplementedError)):
            params[0].sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_cuda_agrees_and_never_waits(variant, problem):
    weights, gradients = problem
    expected = run(weights, gradients, variant=variant, **SETTINGS)
    weights, gradients = [w.cuda() for w in weights], [[g.cuda() for g in grads] for grads in gradients]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(weights, gradients, variant=variant, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", -0.1, "lr is -0.1; allowed: a number of at least 0"),
        ("momentum", 1.0, r"momentum is 1.0; allowed: a number in \[0, 1\)"),
        ("weight_decay", -1e-4, "weight_decay is -0.0001"),
        ("trust_coefficient", 0.0, "trust_coefficient is 0.0; allowed: a number above 0"),
        ("eps", -1.0, "eps is -1.0"),
        ("clamp", 0.0, "clamp is 0.0"),
        ("lr", float("nan"), "lr is nan"),
        ("variant", "b", "unknown LARS variant 'b'; allowed: A, B, C"),
    ],
)
def test_impossible_settings_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        LARS([torch.nn.Parameter(torch.ones(2))], **{"lr": 1.0, setting: value})


def test_sparse_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        LARS([param], lr=1.0).step()
