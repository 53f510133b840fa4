"""Residual networks: ResNet-50 v1.5 with torchvision's parameter names, and the CIFAR forms of 18 and 20.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. v1.5 has the stride of a bottleneck in its
3x3 convolution. They take [0, 1] floats (B, C, H, W) and normalise them by ``mean`` and ``std``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Normalised(nn.Module):
    """Base of networks that take images in [0, 1] and normalise them by ``mean`` and ``std``."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent, so that a state dict has exactly torchvision's names.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + identity)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + identity)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(Normalised):
    """Stages of residual blocks; ``layer1`` … ``layer4`` and ``fc`` as torchvision names them."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        classes: int,
        *,
        channels: int = 3,
        small_images: bool,
        mean: Sequence[float],
        std: Sequence[float],
        last_gamma: float = 0.0,
    ) -> None:
        super().__init__(mean, std)
        self.conv1 = conv(channels, widths[0], 3) if small_images else conv(channels, widths[0], 7, stride=2)
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for i in range(count):
                layers.append(block(inputs, width, stride=2 if stage > 0 and i == 0 else 1))
                inputs = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        _initialise(self, last_gamma)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalise(images)))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _initialise(model: nn.Module, last_gamma: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # With 0, every block starts as the identity (Goyal et al. 2017, section 5.1); torchvision's default is 1.
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, last_gamma)
        elif isinstance(module, BasicBlock):
            nn.init.constant_(module.bn2.weight, last_gamma)


def resnet20(classes: int = 10, last_gamma: float = 0.0) -> ResNet:
    """ResNet-20 for 32x32 images: 3 stages of 3 blocks, widths 16, 32, 64; 0.27 M parameters."""
    return _for_cifar((3, 3, 3), (16, 32, 64), classes, last_gamma)


def resnet18(classes: int = 10, last_gamma: float = 0.0) -> ResNet:
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling; 11.2 M parameters."""
    return _for_cifar((2, 2, 2, 2), (64, 128, 256, 512), classes, last_gamma)


def resnet50(classes: int = 1000, last_gamma: float = 0.0) -> ResNet:
    """ResNet-50 v1.5, torchvision's names; 25,557,032 parameters for 1,000 classes."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        classes,
        small_images=False,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        last_gamma=last_gamma,
    )


def _for_cifar(blocks: Sequence[int], widths: Sequence[int], classes: int, last_gamma: float) -> ResNet:
    return ResNet(
        BasicBlock,
        blocks,
        widths,
        classes,
        small_images=True,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        last_gamma=last_gamma,
    )
