"""Models and losses of other kinds: measured as differences of float64 gradients say, or refused in one sentence."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from conadv_lab.sharpness import measure
from conadv_lab.sharpness.exact import exact_trace
from conadv_lab.sharpness.operators import GGN, Hessian
from conadv_lab.sharpness.problem import Problem

from .oracle import difference_hessian

N = 6


def net(outputs: int = 3, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, outputs)).double()


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(N) % 3
X = real(N, 4)


class Force(nn.Module):
    """Minus an energy's slope, as molecular models give it."""

    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)]
        self.energy = nn.Sequential(*layers).double() if convolution else net(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class InnerStep(nn.Module):
    """A convolution after one step of gradient descent on its own weights, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        loss = self.conv(x).tanh().square().mean()
        weight, bias = torch.autograd.grad(loss, [self.conv.weight, self.conv.bias], create_graph=True)
        return F.conv1d(x, self.conv.weight - weight, self.conv.bias - bias).tanh().mean(2)


class FunctionalForce(Force):
    """The same by torch.func, with a convolution."""

    def __init__(self) -> None:
        super().__init__(convolution=True)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(lambda at: self.energy(at).sum())(x)


class Bag(nn.Module):
    def __init__(self, mode: str, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(7, 4, mode=mode, dtype=torch.float64, **more)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(4, 3).double())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class Ragged(Bag):
    """Bags given by where they begin, one of them empty; each example is the offset of its bag."""

    def forward(self, offsets: Tensor) -> Tensor:
        tokens = torch.arange(14, device=offsets.device) % 7
        return self.head(self.bag(tokens, offsets))


class Tokens(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, sparse=sparse, dtype=torch.float64)
        self.head = net()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


class ComplexNet(nn.Module):
    """Complex weights and a real one, the outputs real."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3, dtype=torch.complex128)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.to(self.first.weight.dtype))
        return self.scale * (z.real.tanh() + 0.3 * z.imag.square())


class Encoded(NamedTuple):
    recon: Tensor
    mu: Tensor
    logvar: Tensor


class Autoencoder(nn.Module):
    def __init__(self, kind: Callable[..., Any] = Encoded) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4).double(), nn.Linear(2, 4).double()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.kind(self.decoder(mu.tanh()), mu, logvar)


def elbo(out: Any, x: Tensor) -> Tensor:
    recon, mu, logvar = out
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
    return F.mse_loss(recon, x) + kl


def elbo_by_name(out: Any, x: Tensor) -> Tensor:
    return elbo((out["recon"], out["mu"], out["logvar"]), x)


class Speech(nn.Module):
    """(time, examples, classes), as CTC wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(2).transpose(0, 1)


def ctc(blank: int = 0, **more: Any) -> Callable[[Tensor, Any], Tensor]:
    loss = nn.CTCLoss(blank, **more)
    return lambda out, y: loss(out, y[0], y[1], y[2])


WORDS = torch.tensor([[1, 2, 2], [3, 3, 1], [4, 1, 2], [1, 1, 1], [2, 4, 2], [1, 4, 4]])
SPOKEN = (WORDS, torch.tensor([8, 8, 7, 8, 6, 8]), torch.tensor([3, 3, 2, 3, 1, 2]))
BAGS = torch.arange(N * 3).view(N, 3) % 5  # token 0 in some of them twice
OFFSETS = torch.tensor([0, 2, 2, 5, 9, 12])

MEASURED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Any, Any]] = {
    "force": (Force, nn.MSELoss(), X, real(N, 4)),
    "force with a convolution": (lambda: Force(True), nn.MSELoss(), X, real(N, 4)),
    "force by torch.func": (FunctionalForce, nn.MSELoss(), X, real(N, 4)),
    "inner step": (InnerStep, nn.CrossEntropyLoss(), X, LABELS),
    "sparse embedding": (lambda: Tokens(True), nn.CrossEntropyLoss(), BAGS, LABELS),
    "bag sum": (lambda: Bag("sum", sparse=True), nn.CrossEntropyLoss(), BAGS, LABELS),
    "bag mean": (lambda: Bag("mean"), nn.CrossEntropyLoss(), BAGS, LABELS),
    "bag mean, padded": (lambda: Bag("mean", padding_idx=0), nn.CrossEntropyLoss(), BAGS, LABELS),
    "bag max": (lambda: Bag("max"), nn.CrossEntropyLoss(), BAGS, LABELS),
    "ctc": (Speech, ctc(), real(N, 8, 3), SPOKEN),
    "ctc, another blank": (Speech, ctc(4, reduction="mean", zero_infinity=True), real(N, 8, 3), (
        WORDS - 1, SPOKEN[1], SPOKEN[2])),
    "data parallel": (lambda: DataParallel(net()), nn.CrossEntropyLoss(), X, LABELS),
    "compiled": (lambda: torch.compile(net()), nn.CrossEntropyLoss(), X, LABELS),
    "whole tuple": (lambda: Autoencoder(lambda *parts: parts), elbo, X, X),
    "whole named tuple": (Autoencoder, elbo, X, X),
    "whole mapping": (
        lambda: Autoencoder(lambda r, m, v: {"recon": r, "mu": m, "logvar": v}), elbo_by_name, X, X),
    "complex weights": (ComplexNet, nn.CrossEntropyLoss(), X, LABELS),
    "class weights": (net, nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)), X, LABELS),
}  # fmt: skip


def real_hessian(model: nn.Module, criterion: Any, x: Tensor, y: Any, without: Sequence[str] = ()) -> Tensor:
    """By differences; for complex weights in real and imaginary part of each, in the package's order."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in without)
    for module in model.modules():
        if getattr(module, "sparse", False):
            module.sparse = False
    if not any(p.is_complex() for p in model.parameters()):
        return difference_hessian(getattr(model, "_orig_mod", model), criterion, x, y)

    class AsReal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = [n for n, _ in model.named_parameters()]
            parts = (torch.view_as_real(p) if p.is_complex() else p for p in model.parameters())
            self.parts = nn.ParameterList(p.detach().clone() for p in parts)

        def forward(self, x: Tensor) -> Any:
            state = {
                name: torch.view_as_complex(p) if part.is_complex() else p
                for name, p, part in zip(self.names, self.parts, model.parameters(), strict=True)
            }
            return torch.func.functional_call(model, state, (x,))

    return difference_hessian(AsReal(), criterion, x, y)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", MEASURED)
def test_measured_right(name):
    make, criterion, x, y = MEASURED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last bias of an energy has no effect on a force
        problem = Problem(make(), criterion, (x, y))
    expected = real_hessian(make(), criterion, x, y, problem.left_out)
    found = Hessian(problem).dense()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    value, gradient = problem.value_and_gradient()
    assert problem.value() == pytest.approx(value) == pytest.approx(problem.initial_loss)
    torch.testing.assert_close(gradient, problem.gradient)
    curvature = GGN(problem).dense()
    exact = exact_trace(problem, matrix="ggn")
    if exact.value is not None:
        assert exact.value == pytest.approx(float(curvature.trace()))
    measure(make(), criterion, (x, y), ("trace", "ggn_trace", "sam_average"), max_samples=40, deflate=8)
