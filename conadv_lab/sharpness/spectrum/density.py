"""The spectral density by stochastic Lanczos quadrature, with a band."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from conadv_lab.mistakes import require, require_count
from conadv_lab.sharpness.spectrum.eigen import Lanczos, Symmetric, normal_vector
from conadv_lab.sharpness.spectrum.journal import Journal


@dataclass(frozen=True)
class Density:
    """A spectrum as weighted points, one set per probe, and as a smooth curve with a band.

    Attributes:
        nodes, weights: for each probe, Ritz values and their weights; a probe's weights sum to one.
        grid: (g,) eigenvalues at which the curve is evaluated.
        density: (g,) the mean over probes, normalised to an integral of one.
        low, high: (g,) its pointwise confidence band over probes.
        sigma: width of the Gaussians.
        products: products with the matrix.
    """

    nodes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    grid: np.ndarray
    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sigma: float
    products: int

    def mean(self, function: object) -> tuple[float, float]:
        """The mean of ``function(λ)`` over the spectrum and its standard error over probes."""
        assert callable(function)
        values = [float((w * function(n)).sum()) for n, w in zip(self.nodes, self.weights, strict=True)]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        return float(np.mean(values)), float(spread / np.sqrt(len(values)))


def quadrature(run: Lanczos) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values and Gauss quadrature weights of a run: the spectrum as seen from its start vector."""
    values, vectors, _ = run.ritz()
    return values, vectors[0] ** 2


def density(
    operator: Symmetric,
    *,
    known: tuple[np.ndarray, Tensor] | None = None,
    probes: int = 4,
    steps: int = 24,
    sigma: float | None = None,
    points: int = 401,
    confidence: float = 0.95,
    seed: int = 0,
    journal: Journal | None = None,
) -> Density:
    """The spectral density (1/n) Σ δ(λ − λᵢ), each point a Gaussian of width ``sigma``.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, alg. 1; for networks Ghorbani et al. 2019).
    Known eigenpairs are included exactly and projected out of the probes, so that outliers have their true weight
    1/n and the probes sample the bulk only.

    Args:
        known: eigenvalues (k,) and unit eigenvectors (k, size).
        probes: number of random starts; two or more for a band.
        steps: Lanczos products per probe.
        journal: stores finished probes, to resume from.
        sigma: ``None``: a hundredth of the spectrum's range.

    Raises:
        ValueError: fewer than one probe or step.
    """
    require_count(probes=probes, steps=steps)
    values, vectors = known if known is not None else (np.empty(0), None)
    n, k = operator.size, len(values)
    all_nodes, all_weights, products = [], [], 0
    for index in range(probes if n > k else 1):
        if n > k:
            run = _probe(operator, vectors, steps, seed, index, journal)
            nodes, weights = quadrature(run)
            products += run.products
        else:
            nodes, weights = np.empty(0), np.empty(0)
        all_nodes.append(np.concatenate([nodes, values]))
        all_weights.append(np.concatenate([weights * (n - k) / n, np.full(k, 1 / n)]))
    return _curve(all_nodes, all_weights, sigma, points, confidence, products)


def _probe(
    operator: Symmetric, against: Tensor | None, steps: int, seed: int, index: int, journal: Journal | None
) -> Lanczos:
    run = Lanczos(operator, normal_vector(operator, seed, 10_000 + index), against=against)
    state = journal.get(f"density-{index}") if journal else None
    if state is not None:
        run.restore(state)
    while run.products < min(steps, run.room):
        run.step()
        if journal and (journal.due or run.products == steps):
            journal.put(f"density-{index}", run.state())
    return run


def _curve(
    nodes: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    sigma: float | None,
    points: int,
    confidence: float,
    products: int,
) -> Density:
    lowest, highest = min(n.min() for n in nodes), max(n.max() for n in nodes)
    sigma = sigma or max((highest - lowest) / 100, 1e-12)
    grid = np.linspace(lowest - 4 * sigma, highest + 4 * sigma, points)
    curves = np.stack([
        (w * stats.norm.pdf(grid[:, None], n, sigma)).sum(1) for n, w in zip(nodes, weights, strict=True)
    ])  # fmt: skip
    mean, half = curves.mean(0), np.full(points, np.nan)
    if len(curves) > 1:
        quantile = stats.t.ppf((1 + confidence) / 2, len(curves) - 1)
        half = quantile * curves.std(0, ddof=1) / np.sqrt(len(curves))
    low = np.maximum(mean - half, 0.0)
    return Density(tuple(nodes), tuple(weights), grid, mean, low, mean + half, float(sigma), products)


def effective_dimension(spectrum: Density, size: int, damping: float) -> tuple[float, float]:
    """Σ λ⁺/(λ⁺ + z) over the spectrum's positive part, with its standard error (MacKay 1992;
    Maddox, Benton and Wilson 2020, eq. 3).

    ``damping`` z is the precision of the prior (such as weight decay times the number of examples); rescaling the
    weights with the function unchanged changes it.
    """
    require(damping > 0, "damping", damping, "a number above 0")
    mean, error = spectrum.mean(lambda v: np.maximum(v, 0) / (np.maximum(v, 0) + damping))
    return size * mean, size * error
