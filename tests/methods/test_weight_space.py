"""The neighbours in weight space against literal renderings of their papers' formulas, in float64.

A rendering knows one function, the gradient of a step's mean loss at a vector of weights, and keeps no model.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from conadv_lab.data.hashing import image_keys, signs
from conadv_lab.data.loader import Stream
from conadv_lab.methods.families.asyncsam import AsyncSAM
from conadv_lab.methods.families.extrap import Extrap
from conadv_lab.methods.families.looksam import LookSAM
from conadv_lab.methods.families.msam import MSAM
from conadv_lab.methods.families.s2sam import S2SAM
from conadv_lab.methods.families.sam import ASAM, SAM
from conadv_lab.methods.families.sampa import SAMPa
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.optim.groups import parameter_groups, set_learning_rate
from conadv_lab.optim.lars import LARS
from tests.conftest import double, image_set, small_cnn

STEPS, BATCH, DECAY, MOMENTUM = 20, 16, 1e-2, 0.9
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1)


def rate(t: int) -> float:
    return 0.2 * math.cos(t / 15)


def stream(micro_batch: int) -> Stream:
    return Stream(image_set(50), seed=5, batch=BATCH, steps=STEPS, micro_batch=micro_batch, augment=double)


@dataclass
class Problem:
    """The losses of all steps as functions of one vector of weights, and SGD on such a vector."""

    micro_batch: int
    model: nn.Module = field(default_factory=lambda: small_cnn().double())

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.start = torch.cat([p.detach().flatten() for p in named.values()])
        self.decay = self.each(lambda p: DECAY if p.ndim > 1 else 0.0)
        self.steps = [list(stream(self.micro_batch).step(t).batches()) for t in range(STEPS)]
        self.velocity = torch.zeros_like(self.start)

    def each(self, value: Callable[[Tensor], float]) -> Tensor:
        """A number a tensor, as a vector."""
        numbers = [float(value(torch.empty(s))) for s in self.shapes]
        return torch.cat(
            [
                torch.full((s.numel(),), n, dtype=torch.float64)
                for s, n in zip(self.shapes, numbers, strict=True)
            ]
        )

    def cut(self, w: Tensor) -> list[Tensor]:
        return [
            part.view(s)
            for part, s in zip(w.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        ]

    def gradient(self, t: int, w: Tensor, part: int | None = None) -> Tensor:
        """∇ of the mean loss of step t at w; of one micro-batch's share of it where ``part`` is given."""
        w = w.clone().requires_grad_()
        weights = dict(zip(self.names, self.cut(w), strict=True))
        batches = self.steps[t] if part is None else [self.steps[t][part]]
        loss = sum(
            CRITERION(functional_call(self.model, weights, (b.images,)), b.labels) * len(b.labels) / BATCH
            for b in batches
        )
        return torch.autograd.grad(loss, w)[0]

    def sgd(self, w: Tensor, g: Tensor, t: int) -> Tensor:
        self.velocity = MOMENTUM * self.velocity + g + self.decay * w
        return w - rate(t) * self.velocity


def sam(p: Problem, rho: float) -> Tensor:
    w = p.start
    for t in range(STEPS):
        g = p.gradient(t, w)
        w = p.sgd(w, p.gradient(t, w + rho * g / g.norm()), t)
    return w


def m_sharpness(p: Problem, rho: float) -> Tensor:
    """Each micro-batch's weights move along its own gradient."""
    w = p.start
    for t in range(STEPS):
        total = 0
        for part in range(len(p.steps[t])):
            g = p.gradient(t, w, part)
            total = total + p.gradient(t, w + rho * g / g.norm(), part)
        w = p.sgd(w, total, t)
    return w


def asam(p: Problem, rho: float, eta: float) -> Tensor:
    w = p.start
    is_weight = torch.cat(
        [torch.full((s.numel(),), "weight" in n) for n, s in zip(p.names, p.shapes, strict=True)]
    )
    for t in range(STEPS):
        g = p.gradient(t, w)
        T = torch.where(is_weight, w.abs() + eta, 1.0)
        w = p.sgd(w, p.gradient(t, w + rho * T**2 * g / (T * g).norm()), t)
    return w


def looksam(p: Problem, rho: float, k: int, alpha: float) -> Tensor:
    w = p.start
    for t in range(STEPS):
        g = p.gradient(t, w)
        if t % k == 0:
            gs = p.gradient(t, w + rho * g / g.norm())
            cosine = (g @ gs) / (g.norm() * gs.norm())
            gv = gs - gs.norm() * cosine * g / g.norm()
            used = gs
        else:
            used = g + alpha * g.norm() / gv.norm() * gv
        w = p.sgd(w, used, t)
    return w


def asyncsam(p: Problem, rho: float, tau: int) -> Tensor:
    w, seen = p.start, []
    for t in range(STEPS):
        seen.append(p.gradient(t, w))
        e = 0 * w
        if t >= tau:
            e = rho * seen[t - tau] / seen[t - tau].norm()
        w = p.sgd(w, p.gradient(t, w + e), t)
    return w


def s2sam(p: Problem, rho: float) -> Tensor:
    w, q = p.start, None
    for t in range(STEPS):
        e = 0 * w if q is None else rho * q / q.norm()
        q = p.gradient(t, w + e)
        w = p.sgd(w, q, t)
    return w


def msam(p: Problem, rho: float) -> Tensor:
    """The decay is of the moved weights."""
    w, v = p.start, torch.zeros_like(p.start)
    for t in range(STEPS):
        moved = w - rho * v / v.norm() if t else w
        v = MOMENTUM * v + p.gradient(t, moved) + p.decay * moved
        w = w - rate(t) * v
    return w


def sampa(p: Problem, rho: float, lam: float) -> Tensor:
    x, v = p.start, torch.zeros_like(p.start)
    at_y = p.gradient(0, x)
    for t in range(STEPS):
        sharp = p.gradient(t, x + rho * at_y / at_y.norm())
        if t == STEPS - 1:
            used = sharp
        else:
            y = x - rate(t) * (MOMENTUM * v + at_y + p.decay * x)
            at_y = p.gradient(t + 1, y)
            used = (1 - lam) * sharp + lam * at_y
        v = MOMENTUM * v + used + p.decay * x
        x = x - rate(t) * v
    return x


def extrap(p: Problem, scale: float, workers: bool) -> Tensor:
    w, last = p.start, {}
    for t in range(STEPS):
        parts = range(len(p.steps[t])) if workers else [None]
        for k in parts:
            last[k] = p.gradient(t, w - scale * rate(t) * last[k] if t else w, k)
        w = p.sgd(w, sum(last.values()), t)
    return w


def extrap_noise(p: Problem, scale: float) -> Tensor:
    """Every micro-batch is a worker; the noise has each tensor's length, and a tensor is known by its place."""
    all_names = [name for name, _ in mixture_batch_norm(small_cnn()).named_parameters()]
    places = [place for place, name in enumerate(all_names) if "adversarial" not in name]
    w, last = p.start, {}
    for t in range(STEPS):
        for k in range(len(p.steps[t])):
            ahead = 0 * w
            if t:
                keys = image_keys(7, f"extrapolation {k}", torch.tensor(t), torch.tensor(places))
                xi = [
                    signs(key, g.numel())[0].double()
                    for key, g in zip(keys.split(1), p.cut(last[k]), strict=True)
                ]
                ahead = torch.cat([x / x.norm() * g.norm() for x, g in zip(xi, p.cut(last[k]), strict=True)])
            last[k] = p.gradient(t, w - scale * rate(t) * ahead, k)
        w = p.sgd(w, sum(last.values()), t)
    return w


def extrap_lars(p: Problem, scale: float) -> Tensor:
    """EXTRAP-LARS as we define it, on LARS's variant B, whose matrices alone are adapted."""
    w, v, last = p.start, torch.zeros_like(p.start), torch.zeros_like(p.start)
    for t in range(STEPS):
        ahead = torch.cat([(trust(a, b) * b).flatten() for a, b in zip(p.cut(w), p.cut(last), strict=True)])
        last = p.gradient(t, w - scale * 20 * rate(t) * ahead)
        step = torch.cat(
            [
                (trust(a, b) * (b + (DECAY if a.ndim > 1 else 0) * a)).flatten()
                for a, b in zip(p.cut(w), p.cut(last), strict=True)
            ]
        )
        v = MOMENTUM * v + step
        w = w - 20 * rate(t) * v
    return w


def trust(w: Tensor, g: Tensor) -> float:
    if w.ndim < 2 or g.norm() == 0:
        return 1.0
    return 0.001 * w.norm() / (g.norm() + DECAY * w.norm() + 1e-8)


def trained(method, micro_batch: int, optimizer=torch.optim.SGD, factor: float = 1.0) -> nn.Module:
    model = mixture_batch_norm(small_cnn()).double()
    own = optimizer(
        [{k: v for k, v in g.items() if k != "adapt" or optimizer is LARS} for g in parameter_groups(model, DECAY)],
        lr=0.2, momentum=MOMENTUM,
    )  # fmt: skip
    method.attach(own)
    steps = stream(micro_batch)
    for t in range(STEPS):
        set_learning_rate(own, factor * rate(t))
        method.backward(model, steps.step(t, method.lookahead), CRITERION)
        own.step()
        own.zero_grad()
    return model


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "adversarial" not in n])


CASES = {
    "sam": (lambda: SAM(0.1), lambda p: sam(p, 0.1)),
    "asam": (lambda: ASAM(0.5, eta=0.01), lambda p: asam(p, 0.5, 0.01)),
    "looksam": (lambda: LookSAM(0.1, every=3, alpha=0.7), lambda p: looksam(p, 0.1, 3, 0.7)),
    "asyncsam-1": (lambda: AsyncSAM(0.1), lambda p: asyncsam(p, 0.1, 1)),
    "asyncsam-3": (lambda: AsyncSAM(0.1, staleness=3), lambda p: asyncsam(p, 0.1, 3)),
    "s2sam": (lambda: S2SAM(0.1), lambda p: s2sam(p, 0.1)),
    "msam": (lambda: MSAM(0.3), lambda p: msam(p, 0.3)),
    "sampa": (lambda: SAMPa(0.1), lambda p: sampa(p, 0.1, 0.2)),
    "extrap": (lambda: Extrap(0.8), lambda p: extrap(p, 0.8, workers=False)),
    "extrap-global": (lambda: Extrap(0.8, "global"), lambda p: extrap(p, 0.8, workers=False)),
    "extrap-workers": (lambda: Extrap(0.8, "micro-batch"), lambda p: extrap(p, 0.8, workers=True)),
    "extrap-noise": (
        lambda: Extrap(0.8, "micro-batch", "noise", seed=7), lambda p: extrap_noise(p, 0.8),
    ),
    "sam-micro-batch": (lambda: SAM(0.1, "micro-batch"), lambda p: m_sharpness(p, 0.1)),
    "sam-rank": (lambda: SAM(0.1, "rank"), lambda p: sam(p, 0.1)),  # one process is one rank
}  # fmt: skip


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("name", CASES)
def test_each_equals_its_formula(name, micro_batch):
    make, literal = CASES[name]
    expected = literal(Problem(micro_batch))
    found = vector(trained(make(), micro_batch))
    assert (found - expected).abs().max() < 1e-12


def test_extrap_has_a_form_for_lars():
    found = vector(trained(Extrap(2.0), 8, LARS, factor=20))
    assert (found - extrap_lars(Problem(8), 2.0)).abs().max() < 1e-12


def test_every_one_is_another():
    """The comparisons could not fail if the methods, or their settings, were alike."""
    finals = {name: vector(trained(make(), 8)) for name, (make, _) in CASES.items()}
    alike = [{"extrap", "extrap-global"}, {"sam", "sam-rank"}]
    for one, other in itertools.combinations(finals, 2):
        if {one, other} not in alike:
            assert (finals[one] - finals[other]).abs().max() > 1e-6, (one, other)
