"""Which models are measured exactly, which by estimates, which are refused: python -m docs.models [--check]

Each kind is measured, and what came of it is written as a table between two comments of docs/faq.md. ``--check``
changes nothing and fails where the table is stale.
"""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.measures.results import Measure

PAGE = Path(__file__).parent / "faq.md"
MARKED = re.compile(r"(<!-- models -->\n\n).*?(\n\n<!-- end of models -->)", re.DOTALL)
EXAMPLES = 12
SHOWN = 2
Kind = tuple[Callable[[], nn.Module], Callable[..., Tensor], Any, dict[str, Any]]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.norm(self.second(x)).relu()).amax((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.square(self.square(x).relu()).relu())


class Last(nn.Module):
    """The last position of a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unflatten(1, (2, 2)))[0][:, -1])


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x, norm)
        return x / norm

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        return g / norm - x * (g * x).sum(1, keepdim=True) / norm**3


class Unit(nn.Module):
    """x / ‖x‖ with a backward pass that takes the norm for a constant when it is differentiated again."""

    def forward(self, x: Tensor) -> Tensor:
        return _Unit.apply(x)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=True).relu())


class Changing:
    """Draws new noise in every pass."""

    def __iter__(self) -> Any:
        noise = torch.Generator()
        noise.seed()
        yield X + torch.randn(X.shape, generator=noise, dtype=X.dtype), LABELS


def net(
    act: type[nn.Module], wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer, last: int = 3
) -> Any:
    return lambda: nn.Sequential(wrap(nn.Linear(4, 5)), act(), nn.Linear(5, last))


class Force(nn.Module):
    """Minus an energy's slope."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight.T).abs()


class Two(nn.Module):
    """Two outputs, both of which the loss takes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


def both(output: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(output[0], targets) + F.mse_loss(output[1][:, 0], targets.double())


def bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(5, 4, sparse=True), nn.Linear(4, 3))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2, 1, 2, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), layer, nn.Flatten(), nn.Linear(4, 3))


def masked(output: Tensor, targets: Tensor) -> Tensor:
    counts = (targets > 0).double()
    return (F.cross_entropy(output, targets, reduction="none") * counts).sum() / counts.sum()


def contrastive(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


def regression(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output.sum(1), targets.double())


_generator = torch.Generator().manual_seed(1)
X = torch.randn(EXAMPLES, 4, generator=_generator, dtype=torch.float64)
IMAGES = torch.randn(EXAMPLES, 1, 4, 4, generator=_generator, dtype=torch.float64)
LABELS = torch.arange(EXAMPLES) % 3
IGNORED = torch.where(torch.arange(EXAMPLES) % 5 < 2, LABELS, -100)
TWO = [(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]
CE = nn.CrossEntropyLoss()
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double())

KINDS: dict[str, Kind] = {
    "Convolutions, batch norm with running statistics, ReLU, max pooling, residual sums": (
        Residual, CE, (IMAGES, LABELS), {}
    ),
    "Linear layers with ReLU, dropout": (net(lambda: nn.Sequential(nn.ReLU(), nn.Dropout())), CE, TWO, {}),
    "Regression": (net(nn.ReLU), regression, TWO, {}),
    "Ignored labels": (net(nn.ReLU), CE, [(X[:7], IGNORED[:7]), (X[7:], IGNORED[7:])], {}),
    "Class weights": (net(nn.ReLU), WEIGHTED, TWO, {}),
    "Smooth activations, as GELU": (net(nn.GELU), CE, TWO, {}),
    "Attention": (attention, CE, TWO, {}),
    "LayerNorm": (net(lambda: nn.Sequential(nn.LayerNorm(5), nn.ReLU())), CE, TWO, {}),
    "Batch norm with batch statistics (`bn=\"train\"`)": (
        Residual, CE, (IMAGES, LABELS), {"bn": "train"}
    ),
    "Recurrent networks": (Last, CE, TWO, {}),
    "Tied weights": (Tied, CE, TWO, {}),
    "Weight norm": (net(nn.ReLU, parametrizations.weight_norm), CE, TWO, {}),
    "Spectral norm": (net(nn.ReLU, parametrizations.spectral_norm), CE, TWO, {}),
    "`torch.compile`, `DataParallel`": (lambda: torch.compile(nn.DataParallel(net(nn.ReLU)())), CE, TWO, {}),
    "Sparse embeddings, `EmbeddingBag`": (bags, CE, (torch.arange(2 * EXAMPLES).view(-1, 2) % 5, LABELS), {}),
    "A forward that takes gradients, as physics-informed and force models": (Force, nn.MSELoss(), (X, X), {}),
    "Complex weights": (Complex, CE, TWO, {}),
    "A loss of several outputs": (Two, both, TWO, {}),
    "A loss that couples examples, all data in one batch": (net(nn.ReLU), contrastive, (X, LABELS), {}),
    "A mean of your own over labels that count, all data in one batch": (net(nn.ReLU), masked, (X, LABELS), {}),
    "The same in several batches": (net(nn.ReLU), masked, TWO, {}),
    "Data that change from pass to pass": (net(nn.ReLU), CE, Changing(), {}),
    "A layer whose second derivative is wrong": (
        lambda: nn.Sequential(net(nn.Tanh)(), Unit()), CE, TWO, {}
    ),
    "A loss without a second derivative": (net(nn.ReLU), nn.MultiMarginLoss(), TWO, {}),
    "TorchScript": (lambda: torch.jit.trace(net(nn.ReLU)().double(), X), CE, TWO, {}),
    "Reentrant checkpointing": (Reentrant, CE, TWO, {}),
    "Outputs that are not classes, in a measure on normalised logits": (
        net(nn.ReLU, last=1), regression, TWO, {"measures": ("adaptive_worst_logit_normalised",)}
    ),
}  # fmt: skip
"""Each with its loss, its data and options of ``measure``."""


def measured(name: str) -> Measure | str:
    """The trace of a kind, or the sentence that refuses it."""
    make, criterion, batches, options = KINDS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return measure(
                make().double(), criterion, batches, **{"measures": ("trace",), **options}
            ).measures[0]
        except ValueError as refusal:
            return str(refusal)


def row(name: str) -> tuple[str, str, str]:
    """Kind, how its trace is had, and why not exactly or not at all."""
    found = measured(name)
    if isinstance(found, str):
        how, why = "refused", found
    else:
        how = "exact" if found.conditions["method"] == "exact" else "estimated"
        reasons = found.conditions.get("not_exact_because", [])
        why = "; ".join(reasons[:SHOWN]) + ("; …" if len(reasons) > SHOWN else "")
    why = re.sub(r"\d+\.\d[\de+-]*|\d+e-\d+", "…", why).replace("|", "\\|").replace("<", "\\<")
    return name, how, why


def table() -> str:
    rows = [("Model, loss or data", "Trace", "Why"), ("---", "---", "---"), *map(row, KINDS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main(arguments: list[str]) -> int:
    text = PAGE.read_text()
    new = MARKED.sub(lambda found: f"{found[1]}{table()}{found[2]}", text)
    if arguments == ["--check"]:
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
