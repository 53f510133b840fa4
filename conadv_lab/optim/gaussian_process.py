"""Gaussian process regression of a noisy curve over [0, 1], in float64 on the CPU, with which AutoWU smooths losses."""

from copy import deepcopy
from dataclasses import dataclass
from math import expm1, log, pi
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

LENGTH_SCALE = 0.2
FIRST_NOISE, LEAST_NOISE = 1e-3, 1e-4


@dataclass(frozen=True)
class Posterior:
    """The posterior of the curve at ``places``, given the data.

    Attributes:
        mean: (m,).
        difference_variance: (m,), of the curve at each place minus the curve at the last one.
    """

    mean: Tensor
    difference_variance: Tensor


class GaussianProcess:
    """y = f(x) + noise, f with constant mean c and covariance s exp(−(x − x')² / 2ℓ²), ℓ = 0.2.

    c, s and the noise variance are fitted by Adam to the mean log likelihood per point. As ℓ is fixed, so are the
    kernel's eigenvectors: with R = QΛQᵀ the kernel matrix at s = 1, the log likelihood is that of independent numbers
    Qᵀ(y − c) with variances sλ + noise, and a step is linear in the number of points.

    The constants are AutoWU's (see `conadv_lab.optim.autowu`). That s and noise are softplus of the fitted values, with
    s starting at softplus(0) and the noise at least 1e-4, is the default of the library that its authors used;
    inferred, not read.
    """

    def __init__(self) -> None:
        raw_noise = log(expm1(FIRST_NOISE - LEAST_NOISE))
        self.raw = torch.tensor([0.0, 0.0, raw_noise], dtype=torch.float64, device="cpu", requires_grad=True)
        self.adam = torch.optim.Adam([self.raw], lr=0.01)

    @property
    def constant(self) -> float:
        """c"""
        return self.raw[0].item()

    @property
    def scale(self) -> float:
        """s"""
        return softplus(self.raw[1]).item()

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return LEAST_NOISE + softplus(self.raw[2]).item()

    def fit(self, x: Tensor, y: Tensor, steps: int = 100) -> None:
        """Set c to the mean of y, then take ``steps`` steps of Adam, starting from the last fit's other values.

        Args:
            x: (n,), float64.
            y: (n,), float64.
            steps: of Adam.
        """
        with torch.no_grad():
            self.raw[0] = y.mean()
        values, vectors = torch.linalg.eigh(kernel(x, x))
        turned, ones = vectors.T @ y, vectors.sum(0)
        for _ in range(steps):
            self.adam.zero_grad()
            (-self._likelihood(values, turned, ones) / len(x)).backward()
            self.adam.step()

    def log_likelihood(self, x: Tensor, y: Tensor) -> float:
        """The log likelihood of the data, (n,) each, at the fitted constants."""
        values, vectors = torch.linalg.eigh(kernel(x, x))
        with torch.no_grad():
            return self._likelihood(values, vectors.T @ y, vectors.sum(0)).item()

    def _likelihood(self, values: Tensor, turned: Tensor, ones: Tensor) -> Tensor:
        variances = softplus(self.raw[1]) * values + LEAST_NOISE + softplus(self.raw[2])
        rest = turned - self.raw[0] * ones
        return -0.5 * (rest.square() / variances + variances.log() + log(2 * pi)).sum()

    @torch.no_grad()
    def predict(self, x: Tensor, y: Tensor, places: Tensor) -> Posterior:
        """The noise-free curve at ``places`` (m,), given data (n,) each."""
        own = self.scale * kernel(x, x)
        own.diagonal().add_(self.noise)
        root = torch.linalg.cholesky(own)
        across = self.scale * kernel(x, places)
        weights = torch.cholesky_solve((y - self.constant)[:, None], root)[:, 0]
        mean = self.constant + across.T @ weights
        explained = torch.linalg.solve_triangular(root, across, upper=False)
        covariance = self.scale * kernel(places, places[-1:])[:, 0] - explained.T @ explained[:, -1]
        variance = self.scale - explained.square().sum(0)
        return Posterior(mean, variance + variance[-1] - 2 * covariance)

    def state_dict(self) -> dict[str, Any]:
        return {"raw": self.raw.detach().clone(), "adam": deepcopy(self.adam.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.raw.copy_(state["raw"])
        self.adam.load_state_dict(state["adam"])


def kernel(one: Tensor, other: Tensor) -> Tensor:
    """exp(−(x − x')² / 2ℓ²), (n, m) for (n,) and (m,)."""
    return torch.exp(-(one[:, None] - other[None, :]).square() / (2 * LENGTH_SCALE**2))
