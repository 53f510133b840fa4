"""What all methods that move the weights share: restoration, statistics, passes, steps that are left out, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.families.asyncsam import AsyncSAM
from conadv_lab.methods.families.late import LateSAM
from conadv_lab.methods.families.looksam import LookSAM
from conadv_lab.methods.families.msam import MSAM
from conadv_lab.methods.families.sam import SAM
from conadv_lab.methods.moving import Move, Weights, norm
from conadv_lab.methods.weight_space import WeightSpace
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.models.resnet import resnet18
from conadv_lab.plan import plan_of
from tests.conftest import image_set, small_cnn

CRITERION = nn.CrossEntropyLoss()
FAMILY = {name: kind for name, kind in METHODS.items() if issubclass(kind, WeightSpace)} | {
    "late-sam": LateSAM
}


def stream(steps: int = 6, micro_batch: int = 8) -> Stream:
    return Stream(image_set(40), seed=1, batch=16, steps=steps, micro_batch=micro_batch)


def made(name: str, **options):
    return method_of(resolved(Config().replace(method=name, **options)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def trained(method, model: nn.Module, steps: Stream, after=lambda number: None) -> nn.Module:
    optimizer = sgd(model)
    method.attach(optimizer)
    for number in range(steps.steps):
        method.backward(model, steps.step(number, method.lookahead), CRITERION)
        after(number)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_copy_restores_every_bit_and_subtracting_does_not():
    """The share is the one that the docstring of `Weights` tells."""
    model = resnet18(10)
    draw = torch.Generator().manual_seed(0)
    weights = Weights(model)
    before = [p.detach().clone() for p in weights.parameters]
    direction = [torch.randn(p.shape, generator=draw) for p in before]
    move = Move(direction, 0.05 / norm(direction))
    with weights.moved(move):
        moved = [p.detach().clone() for p in weights.parameters]
        assert norm(torch._foreach_sub(moved, before)).item() == pytest.approx(0.05, rel=1e-3)
    assert all(torch.equal(p, old) for p, old in zip(weights.parameters, before, strict=True))
    changed = total = 0
    for there, old, one in zip(moved, before, direction, strict=True):
        back = torch.addcmul(there, one, -move.scale)
        changed += int((back != old).sum())
        total += old.numel()
    assert changed / total == pytest.approx(0.002, abs=0.0005)


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_leaves_weights_and_strangers_gradients_alone(name):
    """``backward`` adds to ``.grad`` and touches no bit of a weight, nor anything of the adversarial branch."""
    model = mixture_batch_norm(small_cnn())
    method, optimizer = made(name), sgd(model)
    method.attach(optimizer)
    steps = stream()
    before = [p.detach().clone() for p in model.parameters()]
    adversarial = {n: b.clone() for n, b in model.named_buffers() if "adversarial" in n}
    method.backward(model, steps.step(0, method.lookahead), CRITERION)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(b, adversarial[n]) for n, b in model.named_buffers() if "adversarial" in n)
    assert [n for n, p in model.named_parameters() if p.grad is None] == [
        n for n, _ in model.named_parameters() if "adversarial" in n
    ]
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    method.backward(model, steps.step(0, method.lookahead), CRITERION)
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, 2 * once[n], rtol=1e-4, atol=1e-6), n


@pytest.mark.parametrize("name", FAMILY)
def test_passes_and_costs_are_counted_by_hooks(name):
    """Forwards and backwards of the first layer, of every step; the record's cost, and its average, are theirs."""
    model = mixture_batch_norm(small_cnn())
    method, steps = made(name, late_share=0.5, look_every=3), stream()
    forwards: list[int] = []
    backwards: list[int] = []
    model[0].register_forward_hook(lambda *_: forwards.append(1))
    model[0].weight.register_hook(lambda gradient: backwards.append(1))
    counts = []

    def count(_number: int) -> None:
        counts.append((len(forwards) / 2, len(backwards) / 2))  # of two micro-batches
        forwards.clear()
        backwards.clear()

    trained(method, model, steps, count)
    told = [method.step_cost(number, steps.steps)[0] for number in range(steps.steps)]
    assert counts == [(cost, cost) for cost in told]
    assert sum(told) / len(told) == pytest.approx(method.gradient_evaluations)


@pytest.mark.parametrize("name", ["sam", "asyncsam", "looksam"])
def test_running_statistics_learn_from_the_first_pass_alone(name):
    """The first step's statistics are those of a vanilla step, bit for bit, and are counted once."""
    found = {}
    for kind in (name, "vanilla"):
        model = mixture_batch_norm(small_cnn())
        trained(made(kind), model, stream(steps=1))
        found[kind] = {n: b for n, b in model.named_buffers() if "main" in n}
    for n, buffer in found[name].items():
        assert torch.equal(buffer, found["vanilla"][n]), n
    assert any(int(b) == 1 for n, b in found[name].items() if n.endswith("num_batches_tracked"))


def broken_at(call: int):
    """A criterion whose loss is infinite at one of its calls."""
    calls = 0

    def criterion(outputs, labels):
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(outputs, labels)
        return loss * (math.inf if calls == call else 1)

    return criterion


@pytest.mark.parametrize("call", [2, 3, 4])
@pytest.mark.parametrize("make", [SAM, LookSAM, AsyncSAM])
def test_a_step_with_a_pass_that_is_not_finite_is_left_out_whole(make, call):
    """Two micro-batches and two passes; the criterion's first check makes a call of its own."""
    model = mixture_batch_norm(small_cnn())
    optimizer, method, steps = sgd(model), make(), stream()
    method.attach(optimizer)
    trained_once = steps.step(0)
    method.backward(model, trained_once, CRITERION)
    optimizer.step()
    optimizer.zero_grad()
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(method.state_dict())
    momentum = [copy.deepcopy(one) for one in optimizer.state_dict()["state"].values()]
    method._mean_check = _Unchecked()
    method.backward(model, steps.step(0 if make is LookSAM else 1), broken_at(call))
    optimizer.step()
    assert method.left_out == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, old in zip(optimizer.state_dict()["state"].values(), momentum, strict=True):
        assert torch.equal(one["momentum_buffer"], old["momentum_buffer"])
    if make is AsyncSAM:
        (now,), (old,) = method.state_dict()["shared"]["kept"], kept["shared"]["kept"]
        assert all(torch.equal(a, b) for a, b in zip(now[0], old[0], strict=True))


class _Unchecked:
    def __call__(self, criterion):
        return criterion


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "sam", "rho": -1.0}, "rho is -1.0; allowed: a number of at least 0"),
        ({"method": "sam", "perturbation": "rnak"}, "unknown perturbation 'rnak'.*Did you mean 'rank'"),
        ({"method": "msam", "momentum": 0.0}, "momentum is 0; allowed for msam: above 0"),
        ({"method": "sampa", "optimizer": "lars"}, "optimizer is 'lars'; allowed for sampa: 'sgd'"),
        (
            {"method": "extrap", "optimizer": "lamb"},
            "optimizer is 'lamb'; allowed for extrap: 'sgd' or 'lars'",
        ),
        ({"method": "looksam", "look_every": 0}, "look_every is 0; allowed: a whole number of at least 1"),
        ({"method": "late-sam", "late_method": "late-sam"}, "unknown late_method 'late-sam'; allowed: "),
        ({"method": "late-sam", "early_method": "vanila"}, "unknown early_method 'vanila'.*'vanilla'"),
        (
            {"method": "late-sam", "early_method": "recycled-equal", "late_method": "looksam"},
            "early_method is 'recycled-equal' and late_method 'looksam'; allowed: two with the same number of images",
        ),
        ({"method": "late-sam", "late_method": "msam", "momentum": 0.0}, "allowed for msam: above 0"),
        (
            {"method": "sam", "placement": "ranks"},
            "placement is 'ranks'; allowed for sam: 'serial' or 'stream'",
        ),
        (
            {"method": "asyncsam", "placement": "ranks", "attackers": 1},
            "placement is 'ranks'; allowed for asyncsam",
        ),
        (
            {"method": "conadv-sam", "placement": "ranks", "attackers": 1},
            "placement is 'ranks'; allowed for conadv-sam: 'serial' or 'stream'",
        ),
        (
            {"method": "late-sam", "early_method": "sam", "late_method": "noise-equal"},
            "early_method is 'sam' and late_method 'noise-equal'; allowed: two with the same number of images",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, told):
    with pytest.raises(ValueError, match=told):
        resolved(Config().replace(**options))


def test_a_loop_of_ones_own_tells_of_the_optimizer():
    with pytest.raises(ValueError, match=r"MSAM has no optimizer; call method.attach\(optimizer\)"):
        MSAM().backward(mixture_batch_norm(small_cnn()), stream().step(0), CRITERION)


def test_the_configs_own_radius_is_on_record():
    for name, rho in (("sam", 0.05), ("asam", 0.5), ("msam", 0.3), ("late-sam", 0.05)):
        assert resolved(Config().replace(method=name)).method.rho == rho
    assert resolved(Config().replace(method="extrap")).method.perturbation == "rank"
    assert resolved(Config().replace(method="vanilla")).method.rho is None


def test_memory_of_copies_is_in_the_plan():
    plain, moved = (
        plan_of(Config().replace(method=name, global_batch=64)).memory for name in ("vanilla", "sam")
    )
    assert "copies of the weights" not in plain
    parameters = plain["gradients and optimiser"] / 8
    assert moved["copies of the weights"] == pytest.approx(2 * 4 * parameters)


def test_a_probe_changes_nothing_and_knows_fresh_from_stale():
    model = mixture_batch_norm(small_cnn())
    method, steps = AsyncSAM(0.05), stream()
    optimizer = sgd(model)
    method.attach(optimizer)
    assert method.probe(model, steps.step(0), CRITERION) == {}
    method.backward(model, steps.step(0), CRITERION)
    before = (
        copy.deepcopy(model.state_dict()),
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
    )
    same = method.probe(model, steps.step(0 + 1), CRITERION)
    assert all(torch.equal(v, before[0][n]) for n, v in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before[1], strict=True))
    assert -1 <= same["ascent_cosine"] < 0.999  # of other images
    assert same["ascent_gain_left"] < 1


def test_late_sam_is_the_one_and_then_the_other():
    """The first steps are vanilla's bit for bit, and a run that is all late is SAM's."""
    runs = {}
    for name, method in (
        ("vanilla", Vanilla()), ("sam", SAM()),
        ("none", LateSAM(Vanilla(), SAM(), 0.0)), ("all", LateSAM(Vanilla(), SAM(), 1.0)),
        ("half", LateSAM(Vanilla(), SAM(), 0.5)),
    ):  # fmt: skip
        model = trained(method, mixture_batch_norm(small_cnn()), stream())
        runs[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(runs["none"], runs["vanilla"])
    assert torch.equal(runs["all"], runs["sam"])
    assert not torch.equal(runs["half"], runs["sam"])
    assert not torch.equal(runs["half"], runs["vanilla"])
