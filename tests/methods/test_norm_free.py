"""Every method on a network without batch norm: there is nothing to convert, and both branches are one network."""

import pytest
import torch

import conadv_lab as cl
from conadv_lab.config import Config
from conadv_lab.methods import METHODS
from conadv_lab.models.nf_resnet import NFResNet
from conadv_lab.recipes import digits
from conadv_lab.training.loop import train


def network(config: Config | None = None) -> NFResNet:
    """For digits, small; its last gains are not 0, so that every weight learns from the first step on."""
    torch.manual_seed(0)
    model = NFResNet((1, 1), (8, 16), 10, channels=1, stem=4, small_images=True, mean=(0.3,), std=(0.4,))
    for stage in model.stages:
        torch.nn.init.constant_(stage[0].conv3.gain, 0.5)
    return model


def config(**changes) -> Config:
    recipe = digits.vanilla().replace(
        model=f"{__file__}:network", train_images=90, global_batch=32, steps=6, threads=1, warmup_epochs=0,
        precision="float64", channels_last=True, bn_recalibrate=90, log_every=1,
    )  # fmt: skip
    return recipe.replace(**changes)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains(method, tmp_path):
    result = train(config(method=method), tmp_path / "run", progress="none").result()
    assert result["steps"] == 6
    assert result["test_accuracy"] >= 0


def test_conversion_leaves_it_as_it_is():
    model = network()
    names = list(model.state_dict())
    assert list(cl.mixture_batch_norm(model).state_dict()) == names


def test_sharpness_equals_a_dense_hessian():
    """Standardisation makes the loss curved in each weight, and no shortcut takes it for a plain convolution."""
    model = NFResNet((1,), (4,), 3, channels=1, stem=2, small_images=True, mean=(0.3,), std=(0.4,)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    images, labels = torch.rand(6, 1, 5, 5, dtype=torch.float64), torch.randint(3, (6,))
    criterion, params = torch.nn.CrossEntropyLoss(), dict(model.named_parameters())
    measures = ("top_eigenvalue", "trace")
    report = cl.sharpness.measure(model, criterion, [(images, labels)], measures=measures)

    def loss(flat):
        parts = flat.split([p.numel() for p in params.values()])
        own = {name: part.view_as(params[name]) for name, part in zip(params, parts, strict=True)}
        return criterion(torch.func.functional_call(model, own, (images,)), labels)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    assert report["top_eigenvalue"].value == pytest.approx(
        torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3
    )
    assert report["trace"].value == pytest.approx(hessian.trace().item(), rel=0.02)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_conadv_equals_a_literal_rendering_over_20_steps(staleness):
    """½ ∇L(x) + ½ ∇L(x + ε sign ∇ₓL(x; θ_{t−τ})), clipped to [0, 1], in float64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(20, 6, 1, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(10, (20, 6), generator=generator)
    criterion, epsilon, lr = torch.nn.CrossEntropyLoss(), 0.05, 0.05

    ours = cl.mixture_batch_norm(network().double())
    method = cl.ConAdv(cl.SignAttack(epsilon, random_start=False), staleness=staleness, weights=(0.5, 0.5))
    optimizer = torch.optim.SGD(ours.parameters(), lr=lr)
    for step in cl.lookahead(list(zip(images, labels, strict=True)), steps=20, ahead=method.lookahead):
        method.backward(ours, step, criterion)
        optimizer.step()
        optimizer.zero_grad()

    theirs = network().double()
    params = list(theirs.parameters())
    history = []
    for t in range(20):
        history.append([p.detach().clone() for p in params])
        now, then = history[t], history[max(0, t - staleness)]
        x = images[t].clone().requires_grad_()
        set_to(params, then)
        (gradient,) = torch.autograd.grad(criterion(theirs(x), labels[t]), x)
        set_to(params, now)
        moved = (images[t] + epsilon * gradient.sign()).clamp(0, 1)
        loss = 0.5 * criterion(theirs(images[t]), labels[t]) + 0.5 * criterion(theirs(moved), labels[t])
        gradients = torch.autograd.grad(loss, params)
        set_to(params, [p - lr * g for p, g in zip(now, gradients, strict=True)])
    for one, other in zip(ours.parameters(), params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def set_to(params, values):
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
