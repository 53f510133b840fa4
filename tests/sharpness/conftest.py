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
