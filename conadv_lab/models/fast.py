"""A shallow convolutional network that learns CIFAR-10 in seconds on a GPU, and in minutes on two CPU cores.

Modelled on the DAWNBench entries of D. Page ("How to train your ResNet", 2018) and of airbench94 (K. Jordan,
"94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498): a fixed first layer that whitens 2x2 patches of
the training images, then three groups of convolution, pooling, batch norm, activation, convolution, batch norm,
activation. Convolutions are initialised as the identity where possible, and logits are scaled down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv_lab.models.resnet import CIFAR_MEAN, CIFAR_STD, Normalised, conv

PATCH = 2
WHITENING_IMAGES = 5_000
"""Number of training images whose patches define the first layer, as in airbench94."""


class Whitening(nn.Module):
    """(B, 3, H, W) to (B, 24, H−1, W−1): each 2x2 patch's coordinates along the 12 principal axes of all patches,
    scaled to unit variance, and their negatives. The filters are fixed; only the bias is trained.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A buffer, so that optimisers, weight averages and Hessians do not treat it as a parameter.
        self.register_buffer("weight", torch.zeros(24, 3, PATCH, PATCH))
        self.bias = nn.Parameter(torch.zeros(24))

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the filters to the principal axes of all 2x2 patches of normalised ``images`` (B, C, H, W).

        Computed on the CPU in float64, whatever the training device.

        Args:
            eps: added to the patches' variances, so that axes with little variance are not amplified.
        """
        count, moments = 0, torch.zeros(12, 12, dtype=torch.float64, device="cpu")
        for part in images.cpu().split(500):  # all patches at once would need a gigabyte
            patches = F.unfold(part.double(), PATCH).transpose(1, 2).flatten(0, 1)
            moments += patches.T @ patches
            count += len(patches)
        variances, axes = torch.linalg.eigh(moments / count)
        # The sign of an axis is arbitrary: without a rule machines would choose differently.
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)
        filters = (axes / (variances + eps).sqrt()).T.flip(0).view(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias)


class FastCNN(Normalised):
    """(B, 3, H, W) images in [0, 1] to (B, classes) logits; made for 32x32, at least 16x16.

    Args:
        widths: channels of the three groups.
        classes: outputs.
        logit_scale: factor on the last layer's outputs.
        momentum: weight of a step's statistics in batch norm's running averages.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        classes: int = 10,
        logit_scale: float = 1 / 9,
        momentum: float = 0.4,
    ) -> None:
        super().__init__(CIFAR_MEAN, CIFAR_STD)
        self.logit_scale = logit_scale
        self.whitening = Whitening()
        layers: list[nn.Module] = [nn.GELU()]
        inputs = len(self.whitening.bias)
        for width in widths:
            layers += [
                conv(inputs, width, 3),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width, momentum=momentum),
                nn.GELU(),
            ]
            layers += [conv(width, width, 3), nn.BatchNorm2d(width, momentum=momentum), nn.GELU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes, bias=False)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight[: module.in_channels])

    def fit_whitening(self, images: Tensor) -> None:
        """Compute the first layer's filters from training images (B, 3, H, W) in [0, 1]; they then stay fixed."""
        self.whitening.fit((images.cpu() - self.mean.cpu()) / self.std.cpu())

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(self.whitening(self.normalise(images)))
        return self.fc(x.amax((2, 3))) * self.logit_scale


def fast_cnn(classes: int = 10) -> FastCNN:
    """Widths 64, 256, 256 as in airbench94: 2.0 M parameters, for a GPU."""
    return FastCNN((64, 256, 256), classes)


def fast_cnn_small(classes: int = 10) -> FastCNN:
    """Widths 16, 64, 64: 0.13 M parameters and 9 % of the arithmetic, for a CPU."""
    return FastCNN((16, 64, 64), classes)
