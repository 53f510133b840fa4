"""The fast CIFAR networks: what their first layer does to patches, and that it stays as it is."""

import pytest
import torch
import torch.nn.functional as F

from conadv_lab.config import resolved
from conadv_lab.data.sets import TensorSet
from conadv_lab.models.fast import FastCNN, fast_cnn, fast_cnn_small
from conadv_lab.recipes import cifar
from conadv_lab.training.build import build
from conadv_lab.training.loop import train
from conadv_lab.training.restore import restore


def photographs(count: int = 64, seed: int = 0) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike, as those of photographs are."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return (
        F.interpolate(coarse, (32, 32), mode="bilinear") * 0.7
        + coarse.mean(1, keepdim=True)[..., :1, :1] * 0.3
    )


def pretend_cifar(config):
    """A data set of the user's own, ``file.py:function``."""
    labels = torch.arange(64) % 10
    return TensorSet(photographs(), labels, 10), TensorSet(photographs(seed=1), labels, 10)


def tiny(**changes):
    small = {
        "dataset": f"{__file__}:pretend_cifar",
        "steps": 3,
        "warmup_steps": 1,
        "warmup_epochs": 0.0,
        "threads": 1,
    }
    return cifar.fast_cpu().replace(**{**small, "global_batch": 32, **changes})


@pytest.mark.parametrize(("make", "count"), [(fast_cnn, 1_972_504), (fast_cnn_small, 126_808)])
def test_parameter_counts_and_outputs(make, count):
    model = make()
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert make(100)(torch.rand(2, 3, 16, 16)).shape == (2, 100)


def test_the_first_layer_whitens_the_patches_it_was_fitted_to():
    model, images = fast_cnn_small(), photographs()
    model.fit_whitening(images)
    outputs = model.whitening(model.normalise(images)).double().transpose(0, 1).flatten(1)
    assert torch.equal(outputs[:12], -outputs[12:])
    moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    rows = patches(model, images)
    variances = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    kept = variances > 0.05  # axes of less variance than that are held down by eps
    assert kept.sum() >= 4
    assert torch.allclose(moments[kept][:, kept], torch.eye(int(kept.sum())).double(), atol=0.02)
    assert (moments - moments.diag().diag()).abs().max() < 1e-5


def test_grey_images_lose_no_filter():
    model = fast_cnn_small()
    model.fit_whitening(torch.full((4, 3, 8, 8), 0.5))
    assert (model.whitening.weight.flatten(1).norm(dim=1) > 0).all()


def patches(model, images):
    """Every 2x2 patch as a row of 12 numbers, by slicing."""
    x = model.normalise(images).double()
    views = [x[:, c, i : 31 + i, j : 31 + j] for c in range(3) for i in range(2) for j in range(2)]
    return torch.stack(views, -1).flatten(0, 2)


def test_convolutions_begin_as_the_identity_where_they_can():
    model = FastCNN((32, 16, 64))
    x = torch.rand(1, 24, 8, 8)
    first = model.features[1]
    assert torch.allclose(first(x)[:, :24], x, atol=1e-6)
    assert first.weight[24:].abs().max() > 0
    narrowing, y = model.features[8], torch.rand(1, 32, 8, 8)
    assert torch.allclose(narrowing(y), y[:, :16], atol=1e-6)


def test_a_run_fits_the_filters_to_its_training_images_and_keeps_them(tmp_path):
    config = tiny(method="conadv")
    parts = build(resolved(config))
    expected = fast_cnn_small()
    expected.fit_whitening(photographs())
    assert torch.equal(parts.model.whitening.weight, expected.whitening.weight)
    trained = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert id(parts.model.whitening.bias) in trained
    folder = train(config, tmp_path / "run", progress="none")
    _, model = restore(folder.path, trust=True)
    assert torch.equal(model.whitening.weight, expected.whitening.weight)
    assert model.whitening.bias.abs().max() > 0


def test_biases_of_batch_norm_have_a_learning_rate_of_their_own(tmp_path):
    parts = build(resolved(tiny(bias_lr_factor=16.0)))
    *others, biases = parts.optimizer.param_groups
    assert biases["lr_factor"] == 16
    names = {id(p): n for n, p in parts.model.named_parameters()}
    assert len(biases["params"]) == 2 * 6  # of main and adversarial branch
    assert all(names[id(p)].endswith(("main.bias", "adversarial.bias")) for p in biases["params"])
    assert not any("lr_factor" in group for group in others)


def test_training_by_hand_gives_the_same_biases(tmp_path):
    """One step: β moves by 16 times the learning rate, everything else by the learning rate."""
    config = tiny(
        bias_lr_factor=16.0, steps=1, warmup_steps=0, momentum=0.0, nesterov=False, lr=0.25, weight_decay=0.0
    )
    parts = build(resolved(config))
    before = {n: p.detach().clone() for n, p in parts.model.named_parameters()}
    parts.method.backward(parts.model, parts.stream.step(0), parts.criterion)
    gradients = {n: p.grad for n, p in parts.model.named_parameters() if p.grad is not None}
    _, model = restore(train(config, tmp_path / "run", progress="none").path, trust=True)
    found = dict(model.named_parameters())
    for name, gradient in gradients.items():
        factor = 16 if ".main.bias" in name else 1
        moved = before[name] - 0.25 * factor * gradient
        assert torch.allclose(found[name.replace(".main", "")], moved, rtol=1e-5, atol=1e-6), name
