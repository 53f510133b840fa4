"""ConAdv with SAM and recycled ConAdv with MSAM against literal renderings on copies of the model.

In float64 but for ε, which the renderings of `test_exactness` have in float32.
"""

import copy

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.families.combined import ConAdvSAM, RecycledMSAM
from conadv_lab.methods.families.conadv import ConAdv, DisAdv
from conadv_lab.methods.families.late import LateSAM
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from tests.conftest import double, image_set, small_cnn
from tests.methods.test_exactness import CRITERION, EPSILON, along_gradient, attacked, optimizer_of

STEPS, DECAY, WEIGHTS = 8, 1e-3, (1, 0.5)


def stream(micro_batch: int = 8) -> Stream:
    return Stream(image_set(50), seed=5, batch=16, steps=STEPS, micro_batch=micro_batch, augment=double)


def network() -> nn.Module:
    return mixture_batch_norm(small_cnn()).double()


def trained(method, model: nn.Module) -> nn.Module:
    optimizer = optimizer_of(model)
    method.attach(optimizer)
    for number in range(STEPS):
        method.backward(model, stream().step(number, method.lookahead), CRITERION)
        optimizer.step()
        optimizer.zero_grad()
    return model


def gradient(model: nn.Module, clean, altered) -> list:
    """Of a step's loss, running statistics updated once; also each clean image's."""
    inputs = [batch.images.clone().requires_grad_() for batch in clean]
    weights = WEIGHTS if altered else (1, 0)
    with one_update(model):
        for x, batch in zip(inputs, clean, strict=True):
            (CRITERION(model(x), batch.labels) * (weights[0] * batch.share)).backward()
        for images, batch in altered:
            with branch_of(model, "adversarial"):
                (CRITERION(model(images), batch.labels) * (weights[1] * batch.share)).backward()
    return inputs


@torch.no_grad()
def shifted(model: nn.Module, by: list) -> None:
    for p, one in zip(model.parameters(), by, strict=True):
        p += one


def taken(model: nn.Module) -> list:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return found


def length(vector: list) -> torch.Tensor:
    return torch.cat([one.flatten() for one in vector]).norm()


def conadv_with_sam(tau: int, rho: float) -> nn.Module:
    model = network()
    optimizer, stored = optimizer_of(model), []
    for t in range(STEPS):
        stored.append(copy.deepcopy(model))
        stale = max(0, t - tau)
        batches = list(stream().step(t).batches())
        altered = [(attacked(stored[stale], batch, stale, True), batch) for batch in batches]
        gradient(model, batches, altered)
        ascent = taken(model)
        other = copy.deepcopy(stored[t])
        shifted(other, [rho * one / length(ascent) for one in ascent])
        gradient(other, batches, altered)
        for p, moved in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = moved.grad
        optimizer.step()
        optimizer.zero_grad()
    return model


def recycled_with_msam(rho: float) -> nn.Module:
    model = network()
    optimizer, kept = optimizer_of(model), []
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for t in range(STEPS):
        batches = list(stream().step(t).batches())
        start = [p.detach().clone() for p in model.parameters()]
        away = [-rho * one / length(momentum) if t else 0 * one for one in momentum]
        shifted(model, away)
        inputs = gradient(model, batches, [(along_gradient(b, g), b) for b, g in kept])
        with torch.no_grad():
            for p, old, one in zip(model.parameters(), start, away, strict=True):
                p.copy_(old)
                if p.grad is not None:
                    p.grad += DECAY * one
        kept = [(batch, x.grad) for batch, x in zip(batches, inputs, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
        states = [optimizer.state.get(p, {}).get("momentum_buffer") for p in model.parameters()]
        momentum = [
            torch.zeros_like(p) if one is None else one.clone()
            for p, one in zip(model.parameters(), states, strict=True)
        ]
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    ours, theirs = one.state_dict(), other.state_dict()
    return max((ours[n].double() - theirs[n].double()).abs().max().item() for n in ours)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_conadv_with_sam_equals_its_definition(tau):
    found = trained(ConAdvSAM(SignAttack(EPSILON), tau, WEIGHTS, 0.1), network())
    assert distance(found, conadv_with_sam(tau, 0.1)) < 1e-7


def test_recycled_with_msam_equals_its_definition():
    found = trained(RecycledMSAM(EPSILON, WEIGHTS, 0.3), network())
    assert distance(found, recycled_with_msam(0.3)) < 1e-7


def test_without_a_radius_they_are_conadv_and_recycled():
    attack = SignAttack(EPSILON)
    assert (
        distance(
            trained(ConAdvSAM(attack, 1, WEIGHTS, 0.0), network()),
            trained(ConAdv(attack, 1, WEIGHTS), network()),
        )
        == 0
    )
    assert (
        distance(
            trained(RecycledMSAM(EPSILON, WEIGHTS, 0.0), network()),
            trained(Recycled(EPSILON, weights=WEIGHTS), network()),
        )
        == 0
    )


def test_any_method_may_be_the_late_one():
    """From its first step on ConAdv attacks what it trains on, as it does at the start of a run."""
    half = trained(LateSAM(DisAdv(SignAttack(EPSILON)), ConAdv(SignAttack(EPSILON)), 0.5), network())
    whole = trained(DisAdv(SignAttack(EPSILON)), network())
    assert distance(half, whole) > 1e-6
