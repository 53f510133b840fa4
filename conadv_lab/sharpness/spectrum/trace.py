"""Stochastic traces: deflated Hutchinson to a requested accuracy, Hutch++, XTrace, and the Frobenius norm."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from conadv_lab.mistakes import require
from conadv_lab.sharpness.spectrum.eigen import Lanczos, Symmetric, normal_vector

PILOT = 32
"""Samples in the first stage. With fewer, its variance is so uncertain that some seeds need twice the products."""
LOOK = 16
"""Pairs of samples that decide whether a control variate pays off."""


@dataclass(frozen=True)
class Estimate:
    """A number with the half-width of its confidence interval.

    Attributes:
        value: the estimate.
        error: half-width of the interval; for XTrace and Hutch++ the estimated standard error.
        products: number of products with the matrix.
        samples: number of random vectors.
        converged: the half-width is within the requested accuracy.
    """

    value: float
    error: float
    products: int
    samples: int
    converged: bool


def sign_vector(operator: Symmetric, seed: int, index: int) -> Tensor:
    """A vector of random signs, shape ``(size,)``, sampled on the CPU: the same on every device and rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + 500_009 + index) % 2**63)
    signs = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8, device="cpu")
    return (2 * signs - 1).to(operator.device, operator.dtype)


class Probes:
    """Quadratic forms zᵀAz of random sign vectors, stored as they are sampled; the basis is projected out.

    With V the basis (rows, orthonormal) and P = I − VᵀV, tr(A) = tr(VAVᵀ) + E (Pz)ᵀA(Pz): the large
    eigenvalues, which cause the variance, are summed exactly (Gambhir et al. 2017; Lin 2017).

    Attributes:
        forms: the samples (Pz)ᵀA(Pz).
        squares: the samples ‖A P z‖², for the Frobenius norm.
    """

    def __init__(
        self,
        operator: Symmetric,
        basis: Tensor | None,
        seed: int,
        on_product: Callable[[], None] | None = None,
    ) -> None:
        self.operator, self.basis, self.seed, self.on_product = operator, basis, seed, on_product
        self.forms: list[float] = []
        self.squares: list[float] = []

    def deflated(self, vector: Tensor) -> Tensor:
        """The vector without its component in the basis."""
        if self.basis is None:
            return vector
        for _ in range(2):
            vector = vector - self.basis.T @ (self.basis @ vector)
        return vector

    def draw(self, count: int) -> None:
        """Sample until there are ``count`` samples."""
        while len(self.forms) < count:
            z = self.deflated(sign_vector(self.operator, self.seed, len(self.forms)))
            image = self.operator @ z
            self.forms.append(float(z.double() @ image.double()))
            self.squares.append(float(image.double().square().sum()))
            if self.on_product:
                self.on_product()


def mean_to_accuracy(
    draw: Callable[[int], list[float]],
    known: float,
    accuracy: float,
    *,
    confidence: float = 0.95,
    max_samples: int = 1000,
) -> tuple[float, float, int, bool]:
    """``known`` plus a mean, to a relative accuracy, by Stein's two-stage procedure.

    A pilot of 32 samples gives a variance s²; the number of samples is then fixed at (t·s/target)², and the
    interval is mean ± t·s/√n with the *pilot's* s and its degrees of freedom. The interval's coverage is
    exact for normal samples (Stein 1945, thm 1), unlike that of stopping as soon as an interval looks short.

    Returns:
        value, half-width, samples, whether the target was reached.
    """
    pilot = np.array(draw(PILOT)[:PILOT])
    spread = float(pilot.std(ddof=1))
    quantile = float(stats.t.ppf((1 + confidence) / 2, PILOT - 1))
    target = accuracy * abs(known + float(pilot.mean()))
    needed = math.ceil((quantile * spread / target) ** 2) if target > 0 else max_samples
    count = max(PILOT, min(needed, max_samples))
    samples = np.array(draw(count)[:count])
    half = quantile * spread / math.sqrt(count)
    return known + float(samples.mean()), half, count, needed <= max_samples


def deflated_trace(
    operator: Symmetric,
    *,
    run: Lanczos | None = None,
    deflate: int = 40,
    accuracy: float = 0.01,
    confidence: float = 0.95,
    max_samples: int = 1000,
    seed: int = 0,
    probes: Probes | None = None,
    known: float | None = None,
) -> Estimate:
    """The trace of a symmetric matrix: exact on a Lanczos basis, the rest by Hutchinson until accurate enough.

    Args:
        run: a Lanczos run to deflate with, extended to ``deflate`` products; its products are counted.
        accuracy: requested half-width, relative to the trace.
        probes: samples to use and extend; they are deflated by part of the run's basis.
        known: the trace on that part; ``None``: the part is the whole basis.

    Raises:
        ValueError: ``accuracy`` or ``confidence`` not between 0 and 1.
    """
    require(0 < accuracy < 1, "accuracy", accuracy, "a number between 0 and 1")
    require(0 < confidence < 1, "confidence", confidence, "a number between 0 and 1")
    run = run or Lanczos(operator, normal_vector(operator, seed, 0))
    while run.products < min(deflate, operator.size):
        run.step()
    known = float(np.sum(run.alphas)) if known is None else known
    if run.products >= operator.size:
        return Estimate(known, 0.0, run.products, 0, True)
    probes = probes or Probes(operator, run.basis.clone(), seed)

    def draw(count: int) -> list[float]:
        probes.draw(count)
        return probes.forms

    value, half, samples, reached = mean_to_accuracy(
        draw, known, accuracy, confidence=confidence, max_samples=max_samples
    )
    return Estimate(value, half, run.products + samples, samples, reached)


def controlled_trace(
    hessian: Symmetric,
    ggn: Symmetric,
    ggn_trace: float,
    run: Lanczos,
    *,
    deflate: int = 16,
    accuracy: float = 0.01,
    confidence: float = 0.95,
    max_samples: int = 1000,
    probes: Probes,
) -> Estimate:
    """The Hessian's trace with the Gauss–Newton matrix, whose trace is known exactly, as control variate.

    tr(H) = tr(G) + tr(V(H − G)Vᵀ) + E (Pz)ᵀ(H − G)(Pz). A pilot on both matrices shows whether the smaller
    variance of H − G is worth the second product; if not, :func:`deflated_trace` continues with its samples.

    Args:
        run: of the Hessian; its first ``deflate`` vectors are V.
        probes: of the Hessian, deflated by those vectors.
    """
    basis = run.basis[:deflate]
    second = Probes(ggn, probes.basis, probes.seed)
    probes.draw(LOOK)
    second.draw(LOOK)
    plain = np.array(probes.forms[:LOOK])
    residual = plain - np.array(second.forms)
    known = float(np.sum(run.alphas[:deflate]))
    quantile = float(stats.t.ppf((1 + confidence) / 2, PILOT - 1))
    target = accuracy * max(abs(known + float(plain.mean())), np.finfo(float).tiny)
    samples_plain, samples_residual = (
        max(PILOT, (quantile * float(s.std(ddof=1)) / target) ** 2) for s in (plain, residual)
    )
    if samples_plain <= 2 * samples_residual + len(basis):
        plainly = deflated_trace(
            hessian, run=run, deflate=0, accuracy=accuracy, confidence=confidence, max_samples=max_samples,
            probes=probes, known=known,
        )  # fmt: skip
        return replace(plainly, products=plainly.products + LOOK)
    inside = sum(float(v.double() @ (ggn @ v).double()) for v in basis)

    def draw(count: int) -> list[float]:
        probes.draw(count)
        second.draw(count)
        return [h - g for h, g in zip(probes.forms, second.forms, strict=False)]

    value, half, samples, reached = mean_to_accuracy(
        draw, ggn_trace + known - inside, accuracy, confidence=confidence, max_samples=max_samples
    )
    return Estimate(value, half, run.products + len(basis) + 2 * samples, samples, reached)


def frobenius(run: Lanczos, probes: Probes, deflate: int, confidence: float = 0.95) -> Estimate:
    """‖A‖_F from products already computed: ‖AVᵀ‖² of the Lanczos basis exactly, E‖APz‖² from the probes.

    ‖Av_j‖² = β²_{j−1} + α²_j + β²_j by the recurrence, over the first ``deflate`` vectors, by which the probes are
    deflated. The interval is that of the mean of squares, mapped through the root.
    """
    betas = np.array([0.0, *run.betas])[: deflate + 1]
    known = float((betas[:-1] ** 2 + np.array(run.alphas[:deflate]) ** 2 + betas[1:] ** 2).sum())
    squares = np.array(probes.squares)
    products = run.products + len(squares)
    if not len(squares):
        return Estimate(math.sqrt(known), 0.0, products, 0, True)
    total = known + float(squares.mean())
    quantile = float(stats.t.ppf((1 + confidence) / 2, len(squares) - 1))
    half = quantile * float(squares.std(ddof=1)) / math.sqrt(len(squares))
    return Estimate(math.sqrt(total), half / (2 * math.sqrt(total)), products, len(squares), True)


def hutch_pp(operator: Symmetric, products: int = 120, seed: int = 0) -> Estimate:
    """Hutch++ (Meyer et al. 2021, alg. 1): a third of the products for a range, a third exact, a third random.

    The error is the standard error of the random third; it is exact if a third is as large as the matrix.
    """
    require(products >= 6, "products", products, "at least 6")
    third = min(products // 3, operator.size)
    sketch = torch.stack([sign_vector(operator, seed, i) for i in range(third)], 1)
    basis = torch.linalg.qr(operator @ sketch).Q
    exact = float((basis * (operator @ basis)).double().sum())
    if third == operator.size:
        return Estimate(exact, 0.0, 2 * third, 0, True)
    probes = Probes(operator, basis.T, seed + 1)
    probes.draw(third)
    forms = np.array(probes.forms)
    return Estimate(
        exact + float(forms.mean()), float(forms.std(ddof=1)) / math.sqrt(third), 3 * third, third, True
    )


def xtrace(operator: Symmetric, products: int = 120, seed: int = 0) -> Estimate:
    """XTrace (Epperly, Tropp and Webber 2024, alg. 1.1 without normalisation): every probe serves twice.

    For each test vector ω_i the range of A·(all the others) is treated exactly and ω_i samples the rest;
    the estimate is the mean over i. With Q an orthonormal basis of AΩ, leaving out column i removes one
    direction s_i in Q's coordinates, so no further products are needed.
    """
    require(products >= 4, "products", products, "at least 4")
    m = min(products // 2, operator.size)
    omega = torch.stack([sign_vector(operator, seed, i) for i in range(m)], 1).double()
    image = (operator @ omega.to(operator.dtype)).double()
    q, r = torch.linalg.qr(image)
    z = (operator @ q.to(operator.dtype)).double()
    core = q.T @ z
    if m == operator.size:
        return Estimate(float(torch.trace(core)), 0.0, 2 * m, 0, True)
    s = torch.linalg.pinv(r).T
    s = s / s.norm(dim=0)
    w = q.T @ omega  # ω in Q's coordinates
    samples = []
    for i in range(m):
        keep = torch.eye(m, dtype=torch.float64, device=q.device) - torch.outer(s[:, i], s[:, i])
        inside = keep @ w[:, i]
        rest = omega[:, i] - q @ inside
        form = omega[:, i] @ image[:, i] - 2 * inside @ (z.T @ omega[:, i]) + inside @ (core @ inside)
        exact = torch.trace(core) - s[:, i] @ core @ s[:, i]
        samples.append(float(exact + form) if float(rest.norm()) > 0 else float(exact))
    values = np.array(samples)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(m), 2 * m, m, True)
