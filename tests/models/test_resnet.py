"""The networks: sizes, torchvision's names, and what they compute."""

import pytest
import torch
from torch import nn

from conadv_lab.models.digits import DigitsCNN
from conadv_lab.models.resnet import IMAGENET_MEAN, IMAGENET_STD, resnet18, resnet20, resnet50


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "count"), [(resnet50, 25_557_032), (resnet18, 11_173_962), (resnet20, 272_474)]
)
def test_parameter_counts(make, count):
    """torchvision's ResNet-50; He et al.'s 0.27 M with projection shortcuts; the common CIFAR ResNet-18."""
    assert parameters(make()) == count


def torchvision_resnet50_names() -> set[str]:
    """The names of torchvision's state dict, written out by its rule."""
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{n}" for n in bn)}
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            place = f"layer{layer}.{block}"
            for i in (1, 2, 3):
                names |= {f"{place}.conv{i}.weight", *(f"{place}.bn{i}.{n}" for n in bn)}
            if block == 0:
                names |= {f"{place}.downsample.0.weight", *(f"{place}.downsample.1.{n}" for n in bn)}
    return names


def test_resnet50_has_torchvisions_names_and_strides():
    model = resnet50()
    assert set(model.state_dict()) == torchvision_resnet50_names()
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))  # v1.5
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_images_are_normalised_inside():
    model = resnet50().eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(model.normalise(x), (x - mean) / std)


@pytest.mark.parametrize(("make", "shape"), [(resnet18, (2, 3, 32, 32)), (resnet20, (2, 3, 32, 32)),
                                             (DigitsCNN, (2, 1, 8, 8))])  # fmt: skip
def test_small_networks_take_small_images_and_learn(make, shape):
    torch.manual_seed(0)
    model = make()
    x, y = torch.rand(shape), torch.tensor([3, 7])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = last = 0.0
    for step in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 * first


def test_blocks_start_as_the_identity():
    block = resnet20().layer1[1].eval()
    x = torch.rand(1, 16, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("make", "last"), [(resnet50, "bn3"), (resnet18, "bn2"), (resnet20, "bn2")])
def test_the_last_gamma_of_each_block_begins_as_asked(make, last):
    for gamma in (0.0, 1.0):
        model = make(10, gamma)
        values = {n: set(p.tolist()) for n, p in model.named_parameters() if p.ndim == 1 and "weight" in n}
        lasts = {n for n in values if n.endswith(f"{last}.weight")}
        assert len(lasts) == sum(len(getattr(model, f"layer{i + 1}")) for i in range(model.stages))
        assert all(values[n] == ({gamma} if n in lasts else {1.0}) for n in values)
