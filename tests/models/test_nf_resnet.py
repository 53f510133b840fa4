"""Networks without normalisation: timm's outputs and names, the written formulas, what the β schedule promises."""

from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

from conadv_lab.models.nf_resnet import (
    NFResNet,
    NormFreeBlock,
    ScaledStandardConv,
    nf_resnet20,
    nf_resnet26,
    nf_resnet50,
)
from conadv_lab.models.resnet import IMAGENET_MEAN, IMAGENET_STD
from conadv_lab.optim.groups import parameter_groups

TIMM_LOGITS = [
    [0.13746091273, -0.887427451764, 1.47166696278, -1.770299442, 1.69801392942],
    [0.107912822163, -0.95661225811, 1.62408644782, -1.97180983103, 1.90347450229],
]
"""Logits 0 to 4 of timm 1.0.31's ``nf_resnet50`` in float64, of `waves`, normalised, with the weights of `fill`."""


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Every parameter a function of its place alone, so that it is the same for anybody's model of these names."""
    for number, (name, param) in enumerate(model.named_parameters()):
        values = torch.sin(torch.arange(param.numel(), dtype=torch.float64) * (0.7 + 0.01 * number))
        values = {"weight": values, "bias": 0.1 * values, "gain": 1 + 0.5 * values}[name.rpartition(".")[2]]
        param.copy_(values.view(param.shape))


def waves(size: int) -> torch.Tensor:
    return 0.5 + 0.5 * torch.sin(torch.arange(2 * 3 * size * size, dtype=torch.float64) * 0.31).view(
        2, 3, size, size
    )


def test_outputs_are_those_that_timm_gave():
    model = nf_resnet50().double().eval()
    fill(model)
    with torch.no_grad():
        logits = model(waves(32))[:, :5]
    expected = torch.tensor(TIMM_LOGITS, dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)


def timm_names(depths: tuple[int, ...]) -> list[str]:
    """The names of timm's state dict in their order, written out by its rule."""
    conv = ("weight", "bias", "gain")
    names = [f"stem.conv.{n}" for n in conv]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers = ["downsample.conv"] * (block == 0) + ["conv1", "conv2", "conv3"]
            names += [f"stages.{stage}.{block}.{layer}.{n}" for layer in layers for n in conv]
    return [*names, "head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize(
    ("make", "depths", "count"),
    [(nf_resnet50, (3, 4, 6, 3), 25_557_032), (nf_resnet26, (2, 2, 2, 2), 15_995_176)],
)
def test_names_and_counts_are_timms(make, depths, count):
    with torch.device("meta"):
        model = make()
    assert list(model.state_dict()) == timm_names(depths)
    assert sum(p.numel() for p in model.parameters()) == count


def test_weights_move_to_timm_and_back():
    timm = pytest.importorskip("timm", reason="timm is not installed (extra vision)", exc_type=ImportError)
    theirs, ours = timm.create_model("nf_resnet50").eval(), nf_resnet50().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in theirs.parameters():
            param.add_(0.1 * torch.randn_like(param))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(ours.normalise(images)), rtol=0, atol=1e-5)


def literal_weight(params: dict[str, torch.Tensor], place: str) -> torch.Tensor:
    """Equation 5, a channel at a time."""
    gamma = 1.7139588594436646  # of ReLU
    rows = []
    for weight, gain in zip(params[f"{place}.weight"], params[f"{place}.gain"], strict=True):
        n = weight.numel()
        mean = weight.sum() / n
        var = ((weight - mean) ** 2).sum() / n
        rows.append(gain * gamma * (weight - mean) / ((var + 1e-5) ** 0.5 * sqrt(n)))
    return torch.stack(rows)


def literal(params: dict[str, torch.Tensor], x: torch.Tensor, depths: tuple[int, ...]) -> torch.Tensor:
    """The network's formula from named parameters alone."""

    def conv(place: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = literal_weight(params, place)
        return conv2d(x, weight, params[f"{place}.bias"], stride, padding=weight.shape[-1] // 2)

    mean, std = (torch.tensor(v).to(x).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = max_pool2d(conv("stem.conv", (x - mean) / std, 2), 3, 2, 1)
    variance = 1.0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            place, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            out = x.clamp_min(0) / sqrt(variance)
            if block == 0:
                pooled = (
                    avg_pool2d(out, 2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else out
                )
                x, variance = conv(f"{place}.downsample.conv", pooled), 1.0
            out = conv(f"{place}.conv2", conv(f"{place}.conv1", out).clamp_min(0), stride)
            x = x + 0.2 * conv(f"{place}.conv3", out.clamp_min(0))
            variance += 0.04
    return x.clamp_min(0).mean((2, 3)) @ params["head.fc.weight"].T + params["head.fc.bias"]


def tiny(seed: int = 0, **more) -> NFResNet:
    torch.manual_seed(seed)
    model = NFResNet((2, 2), (8, 16), 5, stem=4, **more).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


def test_equals_the_written_formula_over_20_steps():
    """Outputs, and every parameter as plain SGD moves it."""
    model = tiny()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.rand(3, 3, 17, 17, dtype=torch.float64, generator=generator)
        outputs = model(x), literal(params, x, (2, 2))
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        for tensors, out in zip((list(model.parameters()), list(params.values())), outputs, strict=True):
            gradients = torch.autograd.grad((out - 1).square().mean(), tensors)
            with torch.no_grad():
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor -= 0.01 * gradient
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, params[name], rtol=1e-9, atol=1e-10)


def test_channels_last_gives_the_same_and_keeps_the_layout():
    model, x = tiny(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    conv = model.stages[1][0].conv2
    assert conv.standardised().is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-12
    )


def test_beta_is_the_root_of_the_expected_variance():
    """It grows by 0.04 a block, and each stage's first block, which still divides by the last, sets it back to 1."""
    blocks = [m for m in NFResNet((3, 4), (8, 16), 5).modules() if isinstance(m, NormFreeBlock)]
    expected = [1, 1.04, 1.08, 1.12, 1.04, 1.08, 1.12]
    assert [block.beta**-2 for block in blocks] == pytest.approx(expected)


def test_blocks_begin_as_their_shortcut():
    block = nf_resnet20().stages[0][1]
    x = torch.randn(1, 64, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_gains_and_biases_are_on_the_skip_list():
    """A gain scales a channel as γ of batch norm does, though its shape is a weight's."""
    model = nf_resnet20()
    decayed, skipped = (group["params"] for group in parameter_groups(model, 1e-4))
    convolutions = [m for m in model.modules() if isinstance(m, ScaledStandardConv)]
    assert len(decayed) == len(convolutions) + 1
    assert {id(conv.gain) for conv in convolutions} <= {id(p) for p in skipped}
