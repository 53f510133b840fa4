"""The networks that the sharpness benchmark measures, their data, and their true curvature."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from conadv_lab.models.norm import mixture_batch_norm, plain_batch_norm, recalibrate
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import eigenpairs
from conadv_lab.sharpness.spectrum.exact import exact_trace

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Truth:
    """The true curvature.

    Attributes:
        top: the five largest eigenvalues, largest first.
        trace: the trace.
        spectrum: all eigenvalues, if the matrix is small enough to build.
        told: how these were computed, in words.
    """

    top: np.ndarray
    trace: float
    spectrum: np.ndarray | None
    told: str


@dataclass(frozen=True)
class Subject:
    """A trained network in evaluation mode, one batch, and the largest graph to keep, in bytes."""

    told: str
    model: nn.Module
    batch: Batch
    budget: int

    def problem(self, dtype: torch.dtype | None = None) -> Problem:
        """A new problem with the cross-entropy loss."""
        return Problem(self.model, nn.CrossEntropyLoss(), self.batch, dtype=dtype)


def _trained(model: nn.Module, batch: Batch, epochs: int, lr: float, size: int) -> nn.Module:
    inputs, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def digits(examples: int, epochs: int, data_dir: Path | None, device: str) -> Subject:
    """A convolutional network of about 2,000 weights on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.images[:examples], dtype=torch.float32)[:, None] / 16
    batch = (inputs.to(device), torch.tensor(data.target[:examples]).to(device))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).to(device)  # fmt: skip
    model = _trained(net, batch, epochs, 0.05, 32)
    return Subject(f"a small CNN, {len(batch[1])} digits, {epochs} epochs on them", model, batch, 2**30)


def _images(examples: int, data_dir: Path | None, size: int, classes: int) -> tuple[str, Batch]:
    if data_dir is not None:
        from conadv_lab.data.cifar import load_cifar

        images, labels, _, _ = load_cifar(data_dir)
        return f"the first {examples} of CIFAR-10", (images[:examples].float() / 255, labels[:examples])
    print("no --data-dir: synthetic images, a pattern for each class in noise", file=sys.stderr)
    draw = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 3, size, size, generator=draw)
    labels = torch.randint(0, classes, (examples,), generator=draw)
    noise = torch.rand(examples, 3, size, size, generator=draw)
    return f"{examples} synthetic images", (0.3 * patterns[labels] + 0.7 * noise, labels)


def resnet20(examples: int, epochs: int, data_dir: Path | None, device: str) -> Subject:
    """ResNet-20 on CIFAR-10, 270,000 weights."""
    from conadv_lab.models.resnet import resnet20 as make

    told, (inputs, labels) = _images(examples, data_dir, 32, 10)
    batch = (inputs.to(device), labels.to(device))
    torch.manual_seed(0)
    model = _trained(make().to(device), batch, epochs, 0.05, 50)
    return Subject(f"ResNet-20, {told}, {epochs} epochs on them", model, batch, 2**33)


def resnet18(examples: int, epochs: int, data_dir: Path | None, device: str) -> Subject:
    """ResNet-18 at 32 pixels, 11 million weights; meant for a GPU."""
    from conadv_lab.models.resnet import resnet18 as make

    told, (inputs, labels) = _images(examples, data_dir, 32, 10)
    batch = (inputs.to(device), labels.to(device))
    torch.manual_seed(0)
    model = _trained(make().to(device), batch, epochs, 0.05, 50)
    return Subject(f"ResNet-18, {told}, {epochs} epochs on them", model, batch, 2**34)


def resnet50(examples: int, epochs: int, data_dir: Path | None, device: str) -> Subject:
    """ResNet-50 at 224 pixels with ten classes, on synthetic images; meant for a GPU of 80 GB.

    With a thousand classes the exact trace needs a thousand directions, and the truth would take minutes.
    """
    from conadv_lab.models.resnet import resnet50 as make

    told, (inputs, labels) = _images(examples, None, 224, 10)
    batch = (inputs.to(device), labels.to(device))
    torch.manual_seed(0)
    model = _trained(make(10).to(device), batch, epochs, 0.02, 25)
    recalibrate(mixture_batch_norm(model), [batch[0]])  # after so few steps the running averages are far off
    model = plain_batch_norm(model).eval()
    return Subject(f"ResNet-50, {told}, {epochs} epochs on them", model, batch, 2**34)


SUBJECTS: dict[str, tuple[Callable[..., Subject], int, int]] = {
    "resnet20": (resnet20, 1000, 8),
    "digits": (digits, 256, 10),
    "resnet18": (resnet18, 500, 8),
    "resnet50": (resnet50, 50, 8),
}
"""By name: the function that makes it, examples and epochs."""


def dense_truth(subject: Subject) -> Truth:
    """The truth from the dense matrix in float64."""
    values = torch.linalg.eigvalsh(Hessian(subject.problem(torch.float64)).dense()).flip(0).cpu().numpy()
    return Truth(values[:5], float(values.sum()), values, "the dense float64 Hessian")


def long_truth(subject: Subject) -> Truth:
    """Eigenvalues by Lanczos from another start, to a proven 1e-5; the trace by its exact formula."""
    problem = subject.problem()
    found = eigenpairs(Hessian(problem, memory_budget=subject.budget), 5, tol=1e-5, check=False, seed=999)
    trace = exact_trace(problem)
    if trace.value is None or not found.converged:
        raise RuntimeError(f"no truth: converged {found.converged}, exact trace {trace.refusals}")
    told = f"{found.products} Lanczos products to a bound of 1e-5, and the exact trace"
    return Truth(found.values, trace.value, None, told)
