"""Residual networks without normalisation, with the parameter names of timm's ``nf_resnet50``.

Brock, De, Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets", ICLR 2021
(arXiv 2101.08692). Wang et al. (NoFrost, ICML 2022) train them adversarially instead of networks with batch norm.
They take [0, 1] floats (B, C, H, W) and normalise them.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from conadv_lab.models.resnet import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, Normalised

ALPHA = 0.2
"""Weight of a block's residual branch."""
RELU_GAIN = 1.7139588594436646
"""γ of ReLU, the inverse standard deviation of its output for standard normal inputs, as in the authors' code, which
estimates it from samples; in closed form it is √(2 / (1 − 1/π)) = 1.7129."""


class ScaledStandardConv(nn.Conv2d):
    """A convolution with scaled weight standardisation (equation 5 of the paper), a gain and a bias per channel.

    With W the weight (O, I, k, k), mean and var (biased) over all but the output channel, n = I k k its fan-in:

        Ŵ = gain · γ · (W − mean) / (√(var + eps) · √n)

    Args:
        inputs, outputs: channels.
        size: side of the kernel; ``size // 2`` pixels are padded.
        stride: of the convolution.
        gain: initial value of the gain (O, 1, 1, 1).
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), gain))
        self.scale = RELU_GAIN / sqrt(inputs * size * size)
        self.eps = 1e-5

    def standardised(self) -> Tensor:
        """Ŵ, (O, I, k, k), in the weight's memory format."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (self.gain * self.scale * torch.rsqrt(var + self.eps))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.standardised(), self.bias, self.stride, self.padding)


class Shortcut(nn.Module):
    """Shortcut of a block whose output shape differs from its input's: average pooling, then a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        self.pool = pool if stride > 1 else nn.Identity()
        self.conv = ScaledStandardConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class NormFreeBlock(nn.Module):
    """x ← shortcut + α f(β relu(x)); where the shape changes the shortcut takes β relu(x) as well.

    The last gain of f starts at 0, so that a block starts as its shortcut.

    Args:
        inputs, outputs: channels; the bottleneck has a quarter of ``outputs``.
        stride: of the 3x3 convolution.
        beta: inverse standard deviation of the block's input at initialisation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, beta: float) -> None:
        super().__init__()
        width, self.beta = outputs // 4, beta
        self.downsample = Shortcut(inputs, outputs, stride) if stride > 1 or inputs != outputs else None
        self.conv1 = ScaledStandardConv(inputs, width, 1)
        self.conv2 = ScaledStandardConv(width, width, 3, stride)
        self.conv3 = ScaledStandardConv(width, outputs, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(out)
        out = torch.relu(self.conv1(out))
        out = torch.relu(self.conv2(out))
        return shortcut + ALPHA * self.conv3(out)


class Head(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


class NFResNet(Normalised):
    """Pre-activation bottleneck blocks: ``stem.conv``, ``stages.S.B`` and ``head.fc``, as timm names them.

    A block's β is 1/√v, with v the variance of its input in a network with random weights: 1 at first, plus α² = 0.04
    after each block; a stage's first block, whose shortcut is a convolution, resets v to 1 before adding its own.

    Args:
        depths: blocks of each stage.
        widths: output channels of each stage's blocks, multiples of 4.
        classes: outputs.
        channels: of an image.
        stem: channels of the first convolution.
        small_images: a 3x3 first convolution without pooling, instead of 7x7 with stride 2 and pooling.
        mean, std: of the images, one per channel.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        classes: int,
        *,
        channels: int = 3,
        stem: int = 64,
        small_images: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(mean, std)
        self.stem = nn.Sequential()
        size, stride = (3, 1) if small_images else (7, 2)
        self.stem.add_module("conv", ScaledStandardConv(channels, stem, size, stride))
        if not small_images:
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        self.stages = nn.Sequential()
        inputs, variance = stem, 1.0
        for stage, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(NormFreeBlock(inputs, outputs, stride, beta=1 / sqrt(variance)))
                variance = (1.0 if i == 0 else variance) + ALPHA**2
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))
        self.head = Head(inputs, classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.stages(self.stem(self.normalise(images)))))

    def _initialise(self) -> None:
        """Unit-variance convolutions, as standardisation removes the effect of fan-in; a small last layer."""
        for module in self.modules():
            if isinstance(module, ScaledStandardConv):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)


def nf_resnet50(classes: int = 1000) -> NFResNet:
    """timm's ``nf_resnet50``: 25,557,032 parameters for 1,000 classes, as many as ResNet-50 with batch norm."""
    return NFResNet((3, 4, 6, 3), (256, 512, 1024, 2048), classes)


def nf_resnet26(classes: int = 1000) -> NFResNet:
    """timm's ``nf_resnet26``: 15,995,176 parameters for 1,000 classes."""
    return NFResNet((2, 2, 2, 2), (256, 512, 1024, 2048), classes)


def nf_resnet20(classes: int = 10) -> NFResNet:
    """For 32x32 images: a 3x3 stem, 3 stages of 2 bottleneck blocks, widths 64, 128, 256; ours, not timm's."""
    return NFResNet(
        (2, 2, 2), (64, 128, 256), classes, stem=32, small_images=True, mean=CIFAR_MEAN, std=CIFAR_STD
    )
