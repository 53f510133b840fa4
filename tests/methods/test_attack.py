"""Attacks stay in the ball, climb the loss, and are the same however images are grouped."""

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Batch
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.signs import pack, unpack
from conadv_lab.methods.steps import check_mean
from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from tests.conftest import small_cnn

CRITERION = nn.CrossEntropyLoss()


def batch(count: int = 12, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 2, 6, 6, generator=draw)
    images[0] = 0.0
    images[1] = 1.0
    return Batch(images, torch.arange(count) % 4, torch.zeros(count).long(), torch.arange(count), 1.0)


def warm_model(updates: int = 12) -> nn.Module:
    model = mixture_batch_norm(small_cnn())
    for seed in range(updates):
        with one_update(model), branch_of(model, "adversarial"):
            model(batch(seed=seed).images * 0.5)
    return model


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad(), branch_of(model.eval(), "adversarial"):
        return CRITERION(model(images), labels).item()


ATTACKS = {
    "sign": SignAttack(0.05),
    "sign without start": SignAttack(0.05, random_start=False),
    "sign, step beyond the ball": SignAttack(0.05, step=0.2),
    "sign, short step": SignAttack(0.05, step=0.01, random_start=False),
    "pgd": PGDAttack(0.05, 0.02, steps=4),
    "l2": PGDAttack(0.5, 0.2, steps=4, norm="l2"),
    "l2 without start": PGDAttack(0.5, steps=1, norm="l2", random_start=False),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_in_the_ball_and_in_range_and_the_loss_rises(name):
    attack, model, clean = ATTACKS[name], warm_model(), batch()
    images = attack.apply(clean, attack.perturb(model, clean, CRITERION))
    assert images.min() >= 0
    assert images.max() <= 1
    delta = (images - clean.images).flatten(1)
    sizes = delta.norm(dim=1) if getattr(attack, "norm", "linf") == "l2" else delta.abs().amax(1)
    assert sizes.max() <= attack.epsilon * (1 + 1e-5)
    assert sizes.max() >= 0.2 * attack.epsilon
    assert loss_of(model, images, clean.labels) > loss_of(model, clean.images, clean.labels)


def test_one_pgd_step_is_the_sign_attack():
    model, clean = warm_model(), batch()
    for start in (True, False):
        one, other = SignAttack(0.05, random_start=start), PGDAttack(0.05, steps=1, random_start=start)
        images = [a.apply(clean, a.perturb(model, clean, CRITERION)) for a in (one, other)]
        assert torch.allclose(*images, atol=1e-7)


def test_the_gradient_is_that_of_finite_differences():
    model, clean = warm_model().double().eval(), batch()
    images = clean.images.double() * 0.8 + 0.1
    attack = PGDAttack(1e-4, steps=1, norm="l2", random_start=False)
    gradient = attack.gradient(model, images, clean.labels, CRITERION)
    for place in [(3, 0, 2, 2), (7, 1, 5, 0)]:
        moved = [images.clone(), images.clone()]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        slope = (loss_of(model, moved[0], clean.labels) - loss_of(model, moved[1], clean.labels)) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["sign", "pgd", "l2"])
def test_groups_do_not_matter_once_statistics_are_warm(name):
    attack, model, clean = ATTACKS[name], warm_model(), batch()
    whole = attack.apply(clean, attack.perturb(model, clean, CRITERION))
    parts = []
    for rows in torch.arange(12).split(5):
        part = Batch(clean.images[rows], clean.labels[rows], clean.epochs[rows], clean.indices[rows], 1.0)
        parts.append(attack.apply(part, attack.perturb(model, part, CRITERION)))
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_a_cold_adversarial_branch_is_attacked_with_batch_statistics():
    clean = batch()
    for updates, same in ((9, True), (10, False)):
        model = warm_model(updates)
        default = SignAttack(0.05).perturb(model, clean, CRITERION)
        by_batch = SignAttack(0.05, statistics="batch").perturb(model, clean, CRITERION)
        assert torch.equal(default, by_batch) is same


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 1, 3, 3), (1, 5)])
def test_signs_survive_a_byte_for_eight(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.flatten()[::3] = 0.0
    packed = pack(values)
    assert packed.dtype == torch.uint8
    assert packed.numel() == shape[0] * -(-values[0].numel() // 8)
    assert torch.equal(unpack(packed, values), torch.where(values >= 0, 1.0, -1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignAttack(-0.1), "epsilon is -0.1; allowed: 0 to 1"),
        (lambda: SignAttack(float("nan")), "epsilon is nan"),
        (lambda: SignAttack(0.1, step=0), "step is 0"),
        (lambda: SignAttack(0.1, branch="adversary"), "Did you mean 'adversarial'"),
        (lambda: SignAttack(0.1, statistics="bath"), "Did you mean 'batch'"),
        (lambda: PGDAttack(0.1, steps=0), "steps is 0"),
        (lambda: PGDAttack(0.1, norm="l3"), "unknown norm 'l3'"),
    ],
)
def test_impossible_attacks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "a mean over the images"),
        (nn.CrossEntropyLoss(reduction="none"), "shape"),
    ],
)
def test_a_criterion_that_is_no_mean_is_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        check_mean(criterion, torch.randn(6, 4), torch.arange(6) % 4)
    check_mean(nn.CrossEntropyLoss(label_smoothing=0.2), torch.randn(6, 4), torch.arange(6) % 4)


def test_methods_check_the_criterion_at_their_first_use():
    from conadv_lab.data.lookahead import lookahead

    loader = [(batch().images, batch().labels)]
    (step,) = lookahead(loader, steps=1)
    with pytest.raises(ValueError, match="not a sum"):
        Vanilla().backward(small_cnn(), step, nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 3, 4, 4)], ids=["rows", "videos"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_need_not_be_images(norm, shape):
    attack = PGDAttack(0.3, 0.1, steps=3, norm=norm)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), 4))
    rows = Batch(torch.rand(shape), torch.arange(5) % 4, torch.zeros(5).long(), torch.arange(5), 1.0)
    delta = attack.perturb(model, rows, nn.CrossEntropyLoss()).flatten(1)
    sizes = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert delta.shape == rows.images.flatten(1).shape
    assert ((sizes > 0) & (sizes <= 0.3 + 1e-6)).all()
