"""The methods against slow, literal renderings of their definitions: bitwise equal parameters on a CPU.

The renderings store a copy of the whole model at the start of every step and attack with the stored copy.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from conadv_lab.data.hashing import image_keys, signs, uniform
from conadv_lab.data.loader import Stream
from conadv_lab.methods import steps as parts
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.families.conadv import ConAdv, DisAdv
from conadv_lab.methods.families.controls import Copy, Noise
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from tests.conftest import double, image_set, rest_slow, small_cnn

STEPS, BATCH, EPSILON = 20, 16, 0.1
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1)


def stream(micro_batch: int, batch: int = BATCH, first_batch: int | None = None) -> Stream:
    """50 images, so that steps 3, 6, 9 … begin in one epoch and end in the next."""
    return Stream(
        image_set(50), seed=5, batch=batch, first_batch=first_batch, steps=STEPS, micro_batch=micro_batch
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


def trained(method, steps: Stream, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = mixture_batch_norm(small_cnn()).to(dtype)
    optimizer = optimizer_of(model)
    for number in range(STEPS):
        method.backward(model, steps.step(number, method.lookahead), CRITERION)
        optimizer.step()
        optimizer.zero_grad()
    return model


def attacked(model: nn.Module, batch, updates: int, random_start: bool, seed: int = 0):
    """One sign step on a model that is put away afterwards, so nothing has to be protected."""
    model = copy.deepcopy(model).eval()
    x, shape = batch.images, batch.images.shape
    start = torch.zeros_like(x)
    if random_start:
        keys = image_keys(seed, "start", batch.epochs, batch.indices)
        start = (uniform(keys, x[0].numel()) * (2 * EPSILON) - EPSILON).view(shape)
    moved = (x + start).clamp(0, 1).requires_grad_()
    with branch_of(model, "adversarial", "batch" if updates < 10 else "running"):
        CRITERION(model(moved), batch.labels).backward()
    sign = torch.where(moved.grad >= 0, 1.0, -1.0)
    delta = (sign * EPSILON + start).clamp(-EPSILON, EPSILON)
    return (delta + x).clamp(0, 1)


def algorithm_1(tau: int, micro_batch: int, weights, first: str, random_start: bool) -> nn.Module:
    steps = stream(micro_batch)
    model = mixture_batch_norm(small_cnn())
    optimizer = optimizer_of(model)
    snapshots, adversarial_steps = [], 0
    updates = []
    for t in range(STEPS):
        snapshots.append(copy.deepcopy(model))
        updates.append(adversarial_steps)
        batches = list(steps.step(t).batches())
        stale = max(0, t - tau)
        only_clean = first == "clean" and t < tau
        with one_update(model):
            for batch in batches:
                loss = CRITERION(model(batch.images), batch.labels)
                (loss * ((1.0 if only_clean else weights[0]) * batch.share)).backward()
                if not only_clean:
                    images = attacked(snapshots[stale], batch, updates[stale], random_start)
                    with branch_of(model, "adversarial"):
                        loss = CRITERION(model(images), batch.labels)
                    (loss * (weights[1] * batch.share)).backward()
        adversarial_steps += not only_clean
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("micro_batch", rest_slow([16, 4], 16))
@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize(
    ("first", "weights", "random_start"),
    [("initial", (1, 1), True), ("clean", (0.5, 0.5), True), ("initial", (0.5, 0.5), False)],
)
def test_conadv_equals_algorithm_1_with_weight_snapshots(tau, micro_batch, first, weights, random_start):
    method = ConAdv(SignAttack(EPSILON, random_start=random_start), tau, weights, first)
    expected = algorithm_1(tau, micro_batch, weights, first, random_start)
    assert_same(trained(method, stream(micro_batch)), expected)


def test_staleness_changes_the_result():
    """The oracle test could not fail if τ made no difference."""
    runs = [trained(ConAdv(SignAttack(EPSILON), tau), stream(16)) for tau in (0, 1, 3)]
    finals = [torch.cat([p.flatten() for p in model.parameters()]) for model in runs]
    assert not torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[1], finals[2])


def test_disadv_is_conadv_without_staleness():
    assert_same(
        trained(DisAdv(SignAttack(EPSILON)), stream(4)), trained(ConAdv(SignAttack(EPSILON), 0), stream(4))
    )


def recycled_or_control(micro_batch: int, equal: bool, weights, moved_of, same_batch: bool) -> nn.Module:
    """Clean images, and this or the last step's images altered without an attack pass.

    At equal cost a step's two halves share one forward, split at the number of clean images.
    """
    steps = stream(micro_batch, BATCH // 2, BATCH) if equal else stream(micro_batch)
    model = mixture_batch_norm(small_cnn())
    optimizer = optimizer_of(model)
    kept: list = []
    for t in range(STEPS):
        batches = list(steps.step(t).batches())
        inputs = [batch.images.clone().requires_grad_() for batch in batches]
        others = [(b, None) for b in batches] if same_batch else kept[: len(batches)]
        moved = [moved_of(batch, gradient) for batch, gradient in others]

        def clean(i, weight, model=model, batches=batches, inputs=inputs):
            loss = CRITERION(model(inputs[i]), batches[i].labels)
            (loss * (weight * batches[i].share)).backward()

        def other(i, model=model, batches=batches, others=others, moved=moved):
            with branch_of(model, "adversarial"):
                loss = CRITERION(model(moved[i]), others[i][0].labels)
            (loss * (weights[1] * batches[i].share)).backward()

        with one_update(model):
            for i, batch in enumerate(batches):
                if equal and others:
                    split = len(batch.labels)
                    with branch_of(model, (split, len(moved[i]))):
                        outputs = model(torch.cat([inputs[i], moved[i]]))
                    halves = (outputs[:split], batch.labels), (outputs[split:], others[i][0].labels)
                    parts = [
                        CRITERION(*half) * (w * batch.share) for half, w in zip(halves, weights, strict=True)
                    ]
                    (parts[0] + parts[1]).backward()
                else:
                    clean(i, weights[0] if others else 1.0)
                    if same_batch:
                        other(i)
            if not same_batch and not equal:
                for i in range(len(others)):
                    other(i)
        kept = [(batch, x.grad) for batch, x in zip(batches, inputs, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    return model


def along_gradient(batch, gradient):
    sign = torch.where(gradient >= 0, 1.0, -1.0)
    return (sign * EPSILON + batch.images).clamp(0, 1)


def with_noise(batch, _gradient):
    keys = image_keys(0, "noise", batch.epochs, batch.indices)
    return (signs(keys, batch.images[0].numel()).view(batch.images.shape) * EPSILON + batch.images).clamp(
        0, 1
    )


def unchanged(batch, _gradient):
    return batch.images


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize(
    ("method", "equal", "moved_of", "same_batch"),
    [
        (lambda: Recycled(EPSILON), False, along_gradient, False),
        (lambda: Recycled(EPSILON, equal_cost=True), True, along_gradient, False),
        (lambda: Noise(EPSILON), False, with_noise, True),
        (lambda: Noise(EPSILON, equal_cost=True), True, with_noise, False),
        (lambda: Copy(), False, unchanged, True),
        (lambda: Copy(equal_cost=True), True, unchanged, False),
    ],
    ids=["recycled", "recycled-equal", "noise", "noise-equal", "copy", "copy-equal"],
)
def test_recycled_and_controls_equal_their_definition(method, equal, moved_of, same_batch, micro_batch):
    weights = (0.5, 0.5) if equal else (1, 1)
    steps = stream(micro_batch, BATCH // 2, BATCH) if equal else stream(micro_batch)
    expected = recycled_or_control(micro_batch, equal, weights, moved_of, same_batch)
    assert_same(trained(method(), steps), expected)


@pytest.mark.parametrize("make", [lambda: Recycled(EPSILON, True), lambda: Noise(EPSILON, True)])
def test_one_forward_for_both_halves_is_two_forwards(make, monkeypatch):
    """To rounding in float64, the equal-cost step is the sum of a clean and an altered half."""

    def apart(model, clean, altered, criterion, weights, _lanes):
        losses = []
        for batch, weight, branch in ((clean, weights[0], "main"), (altered, weights[1], "adversarial")):
            losses.append(parts.train_on(model, batch.images, batch, criterion, weight, branch))
        return losses

    results = []
    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(parts, "train_on_both", apart)
            steps = stream(4, BATCH // 2, BATCH)
            steps.augment = double
            results.append(trained(make(), steps, dtype=torch.float64))
    for one, two in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-11)


def test_vanilla_is_plain_gradient_descent():
    model = small_cnn()
    optimizer = optimizer_of(model)
    steps = stream(16)
    for t in range(STEPS):
        (batch,) = steps.step(t).batches()
        CRITERION(model(batch.images), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = trained(Vanilla(), steps)
    for expected, got in zip(
        model.parameters(), (p for n, p in ours.named_parameters() if "adversarial" not in n), strict=True
    ):
        assert torch.equal(expected, got)


def test_images_ahead_leave_no_trace_in_the_weight_gradient():
    """Whatever the next batch holds, this step's gradient is bitwise the same."""
    gradients = []
    for seed in (0, 1):
        model = mixture_batch_norm(small_cnn())
        images = image_set(32)
        other = image_set(32, seed=9)
        images.images[16:] = images.images[16:] if seed == 0 else other.images[16:]
        steps = _InOrder(images, seed=0, batch=16, steps=2)
        method = ConAdv(SignAttack(EPSILON), 1)
        method.backward(model, steps.step(0, 1), CRITERION)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


class _InOrder(Stream):
    def _batch(self, first, last, share):
        batch = super()._batch(first, last, share)
        indices = torch.arange(first, last)
        images, labels = self.images.fetch(indices)
        return replace(batch, images=images.float() / 255, labels=labels, indices=indices)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_an_attack_changes_neither_gradients_nor_statistics_nor_modes(statistics):
    model = mixture_batch_norm(small_cnn()).train()
    model[3].weight.requires_grad_(False)
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    (batch,) = stream(16).step(0).batches()
    SignAttack(EPSILON, statistics=statistics).perturb(model, batch, CRITERION)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model[2].training
    assert not model[3].weight.requires_grad
    assert model[0].weight.requires_grad
