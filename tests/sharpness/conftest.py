"""Small models with dense float64 truths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

torch.set_num_threads(1)


class TinyTransformer(nn.Module):
    """One attention layer with its own arithmetic of heads left to torch, so fused paths are met."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    model[1].running_mean.normal_(std=0.1)
    return model


def mlp(act: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), act(), nn.Linear(6, 5))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return TinyTransformer()


QUICK = {
    "k": 2, "draws": 4, "ascent_steps": 2, "steps": 6, "probes": 2, "pgd_steps": 2, "subspace": 5, "deflate": 8,
    "max_samples": 40, "keskar_epsilons": (1e-3,), "rhos": (0.1,), "adaptive_rhos": (1.0,), "relative_rhos": (0.1,),
}  # fmt: skip
"""Settings under which each measure takes a part of a second."""


def fitted(act: type[nn.Module] = nn.ReLU, device: str = "cpu") -> tuple[nn.Module, list]:
    """A convolutional network that has learnt its 24 images, so that noise costs it accuracy, and three batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), act(), nn.Flatten(), nn.Linear(27, 4))
        x, y = torch.rand(24, 1, 5, 5), torch.randint(0, 4, (24,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(device).eval()
    return model, [(x[i : i + 8].to(device), y[i : i + 8].to(device)) for i in (0, 8, 16)]


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp, "transformer": transformer}


def ragged_batches(name: str, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if name == "transformer":
        inputs = torch.randint(0, 7, (21, 4), generator=generator)
    else:
        inputs = torch.randn(21, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 5, (21,), generator=generator)
    return [(inputs[a:b], labels[a:b]) for a, b in ((0, 8), (8, 16), (16, 21))]


def dense_hessian(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], criterion: Callable[..., Tensor]
) -> Tensor:
    """The Hessian over all examples at once, by torch's own dense routine: it shares no code with ours."""
    inputs = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    named = list(model.named_parameters())
    shapes = [p.shape for _, p in named]

    def loss(flat: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        state = {name: p for (name, _), p in zip(named, parts, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return criterion(functional_call(model, state, (inputs,)), labels)

    flat = torch.cat([p.detach().reshape(-1) for _, p in named])
    model.eval()
    return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture(params=sorted(MODELS))
def subject(request: pytest.FixtureRequest) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    return MODELS[request.param]().double(), ragged_batches(request.param)


STRANGER = """
import torch
from torch import nn

def subject():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [(torch.randn(20, 6), torch.randint(0, 3, (20,))) for _ in range(4)]
    return model, nn.CrossEntropyLoss(), batches

def wrong():
    return 3

def once():
    model, criterion, batches = subject()
    return model, criterion, (batch for batch in batches)

no_function = 3
"""


@pytest.fixture
def stranger(tmp_path):
    file = tmp_path / "stranger.py"
    file.write_text(STRANGER)
    return f"{file}:subject"
