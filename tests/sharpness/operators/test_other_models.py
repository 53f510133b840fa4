"""Models and losses of other kinds: measured as differences of float64 gradients say, or refused in one sentence."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from conadv_lab.sharpness import measure
from conadv_lab.sharpness.operators.bags import ctc_loss, embedding_bag
from conadv_lab.sharpness.operators.matrices import GGN, Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import cross_check
from conadv_lab.sharpness.spectrum.exact import exact_trace
from tests.sharpness.oracle import difference_hessian

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
    """By differences."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in without)
    return difference_hessian(getattr(model, "_orig_mod", model), criterion, x, y)


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


def test_class_weights_of_another_type():
    """Float32 weights beside a model in float64, as a module and in a partial; the caller's stay what they are."""
    weight = torch.tensor([0.5, 1.0, 2.0])
    loss = nn.CrossEntropyLoss(weight=weight)
    expected = difference_hessian(net(), nn.CrossEntropyLoss(weight=weight.double()), X, LABELS)
    for criterion in (loss, partial(F.cross_entropy, weight=weight)):
        problem = Problem(net().float(), criterion, (X.float(), LABELS), dtype=torch.float64)
        torch.testing.assert_close(Hessian(problem).dense(), expected, rtol=1e-5, atol=1e-6)
    assert loss.weight.dtype == torch.float32


def test_a_compiled_part_runs_as_it_was_written():
    model = net()
    expected = Hessian(Problem(net(), nn.CrossEntropyLoss(), (X, LABELS))).dense()
    model[0] = torch.compile(model[0])
    assert torch.equal(Hessian(Problem(model, nn.CrossEntropyLoss(), (X, LABELS))).dense(), expected)
    compiled = torch.compile(nn.CrossEntropyLoss())
    torch.testing.assert_close(Hessian(Problem(net(), compiled, (X, LABELS))).dense(), expected)


def test_embeddings_are_sparse_again_afterwards():
    model = Tokens(True)
    measure(model, nn.CrossEntropyLoss(), (BAGS, LABELS), ("top_eigenvalue",))
    assert model.embed.sparse


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("more", [{}, {"padding_idx": -2}, {"include_last_offset": True}], ids=str)
def test_bags_are_torchs(mode, more):
    """Values and first derivatives, empty bags among them, and weighted ones where torch has them."""
    tokens, weight = torch.tensor([0, 5, 5, 2, 6, 1, 3]), real(7, 4).requires_grad_()
    offsets = torch.tensor([0, 2, 2, 6, 7])
    each = real(7).requires_grad_() if mode == "sum" else None
    found, expected = (
        function(tokens, weight, offsets, mode=mode, per_sample_weights=each, **more)
        for function in (embedding_bag, F.embedding_bag)
    )
    torch.testing.assert_close(found, expected)
    leaves = [weight] if each is None else [weight, each]
    slopes = [torch.autograd.grad(bags.cos().sum(), leaves) for bags in (found, expected)]
    torch.testing.assert_close(*slopes)
    flat = tokens[:6].view(2, 3)
    torch.testing.assert_close(
        embedding_bag(flat, weight, mode=mode), F.embedding_bag(flat, weight, mode=mode)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("blank", [0, 4])
def test_ctc_is_torchs(reduction, blank):
    """Values and first derivatives, with labels that cannot be aligned, in rows and end to end."""
    logits = real(8, N, 5).requires_grad_()
    words, lengths, sizes = WORDS - int(blank == 4), SPOKEN[1].clone(), SPOKEN[2]
    lengths[3] = 3  # three times the same label need two blanks between them
    flat = torch.cat([row[:size] for row, size in zip(words, sizes, strict=True)])
    for labels in (words, flat):
        out = logits.log_softmax(2)
        found, expected = (
            function(out, labels, lengths, sizes, blank, reduction, True)
            for function in (ctc_loss, F.ctc_loss)
        )
        torch.testing.assert_close(found, expected)
        # In the logits: torch's own gradient in log-probabilities is right only below a log_softmax.
        slopes = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, expected)]
        torch.testing.assert_close(*slopes)
    assert torch.isinf(ctc_loss(out, words, lengths, sizes, blank, "none"))[3]


class Hidden(torch.autograd.Function):
    """A matrix product that no record of torch functions shows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.weight = net(4, nn.ReLU), nn.Parameter(real(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(self.net(x), self.weight)


@pytest.mark.parametrize(
    ("make", "told"), [(Unseen, "parameter 'weight' is used"), (Force, "in a way that recording")]
)
def test_no_exact_trace_where_a_weight_enters_unseen(make, told):
    target = real(N, 4) if make is Force else LABELS
    loss = nn.MSELoss() if make is Force else nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = Problem(make(), loss, (X, target))
    exact = exact_trace(problem, matrix="ggn")
    assert exact.value is None
    assert told in exact.refusals[0]


def test_as_many_times_as_examples_are_not_taken_for_them():
    """Where the outputs' first axis has the examples' length by chance."""
    x, y = real(N, N, 3), (WORDS[:, :2], torch.full((N,), N), torch.full((N,), 2))
    problem = Problem(Speech(), ctc(), (x, y))
    assert exact_trace(problem, matrix="ggn").value is None
    with pytest.raises(
        ValueError, match="the Fisher matrix needs outputs whose first axis indexes the examples"
    ):
        measure(Speech(), ctc(), (x, y), ("fisher_rao",))
    torch.testing.assert_close(
        Hessian(problem).dense(), difference_hessian(Speech(), ctc(), x, y), rtol=1e-5, atol=1e-8
    )


def test_a_loss_of_torch_gets_the_first_tensor_of_several():
    model = Autoencoder(lambda *parts: parts)
    problem = Problem(model, nn.MSELoss(), (X, X))
    assert not problem.whole
    assert problem.initial_loss == pytest.approx(float(F.mse_loss(model(X)[0], X)))


@pytest.mark.parametrize("name", ["fisher_rao", "pac_bayes_flatness", "adaptive_worst_logit_normalised"])
def test_what_needs_logits_is_refused_where_the_whole_output_is_judged(name):
    with pytest.raises(ValueError, match=r"needs (one output tensor, but|outputs of at least 3 classes)"):
        measure(Autoencoder(), elbo, (X, X), (name,))


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))


def parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    model, mesh = net(), init_device_mesh("cpu", (1,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
    assert isinstance(model[0].weight, DTensor)
    return model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("make", [sharded, parallel])
def test_weights_in_pieces_are_refused_and_the_way_out_works(make):
    model = make()
    told = "parameter '0.weight' is a DTensor, .*; allowed: a plain copy of the model"
    with pytest.raises(ValueError, match=told) as caught:
        measure(model, nn.CrossEntropyLoss(), (X, LABELS))
    assert "\n" not in str(caught.value)
    plain = net()
    state = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.state_dict().items()}
    plain.load_state_dict(state)
    assert measure(plain, nn.CrossEntropyLoss(), (X, LABELS), ("trace",))["trace"].value > 0


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(real(7, 4)), net()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.embedding(tokens, self.table, sparse=True).mean(1))


class Odd(nn.Module):
    """An object without logits, which no criterion can be given in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(answer=self.inner(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "scripted": (lambda: torch.jit.script(net()), nn.CrossEntropyLoss(), X, "the model is TorchScript"),
    "traced part": (lambda: nn.Sequential(torch.jit.trace(net(), X), nn.Tanh()), nn.CrossEntropyLoss(), X,
                    "module '0' of the model is TorchScript"),
    "functional sparse": (Functional, nn.CrossEntropyLoss(), BAGS, "parameter 'table' has a sparse gradient"),
    "an object": (Odd, lambda out, y: F.cross_entropy(out.answer, y), X, "the criterion takes the whole output"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name):
    make, criterion, x, told = REFUSED[name]
    with pytest.raises(ValueError, match=told) as caught:
        measure(make(), criterion, (x, LABELS))
    assert "\n" not in str(caught.value)
    assert "allowed: " in str(caught.value)


def test_the_cross_check_refuses_what_pyhessian_would_get_wrong():
    for model, criterion, y, told in (
        (ComplexNet(), nn.CrossEntropyLoss(), LABELS, "complex weights"),
        (Autoencoder(), elbo, X, "a criterion of the whole output"),
    ):
        with pytest.raises(ValueError, match=f"the cross-check has {told}"):
            cross_check(Problem(model, criterion, (X, y)))


def test_recurrent_layers_do_without_cudnn():
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(4, 3, batch_first=True).double(), nn.Linear(3, 3).double()
            self.seen: set[bool] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add(torch.backends.cudnn.enabled)
            return self.head(self.cell(x[:, None])[0].mean(1))

    model = Seen()
    measure(model, nn.CrossEntropyLoss(), (X, LABELS), ("top_eigenvalue",))
    assert model.seen == {False}
    assert torch.backends.cudnn.enabled
