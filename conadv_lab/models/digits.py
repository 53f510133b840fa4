"""A small convolutional network for 8x8 grey digits."""

import torch
from torch import Tensor, nn

from conadv_lab.models.resnet import Normalised, conv


class DigitsCNN(Normalised):
    """Six 3x3 convolutions with batch norm, pooled twice: (B, 1, 8, 8) in [0, 1] to (B, classes)."""

    def __init__(self, classes: int = 10, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__(mean=(0.305,), std=(0.376,))
        layers: list[nn.Module] = []
        inputs = 1
        for stage, width in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(2):
                layers += [conv(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(self.normalise(images))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
