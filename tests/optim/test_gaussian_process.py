"""The regression against scikit-learn's, and its fit against a dense likelihood under Adam."""

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

from conadv_lab.optim.gaussian_process import LEAST_NOISE, GaussianProcess


def curve(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, dtype=torch.float64, generator=generator).sort().values
    noise = 0.05 * torch.randn(count, dtype=torch.float64, generator=generator)
    return x, 2.3 - 2 * x + 3 * (x - 0.6).clamp_min(0) ** 2 + noise


def dense_fit(raw: list[torch.Tensor], adam: torch.optim.Adam, x: torch.Tensor, y: torch.Tensor) -> None:
    """100 steps of Adam on the joint density of all points, by Cholesky's factor of the whole covariance."""
    with torch.no_grad():
        raw[0].fill_(y.mean())
    kernel = torch.exp(-((x[:, None] - x) ** 2) / (2 * 0.2**2))
    for _ in range(100):
        adam.zero_grad()
        noise = (1e-4 + softplus(raw[2])) * torch.eye(len(x), dtype=torch.float64)
        density = MultivariateNormal(raw[0].expand(len(x)), softplus(raw[1]) * kernel + noise)
        (-density.log_prob(y) / len(x)).backward()
        adam.step()


def test_fits_equal_a_dense_likelihoods_from_one_to_the_next():
    """Two fits in a row: scale, noise and Adam's moments go on, the constant begins at the mean."""
    process = GaussianProcess()
    assert (process.noise, process.scale) == pytest.approx((1e-3, np.log(2)))
    raw = [value.clone().requires_grad_() for value in process.raw.detach()]
    adam = torch.optim.Adam(raw, lr=0.01)
    for count in (5, 25):
        x, y = curve(count, seed=count)
        process.fit(x, y)
        dense_fit(raw, adam, x, y)
        ours = process.constant, process.scale, process.noise
        theirs = raw[0].item(), softplus(raw[1]).item(), LEAST_NOISE + softplus(raw[2]).item()
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 40, 300])
def test_posterior_and_likelihood_equal_scikit_learns(count):
    x, y = curve(count)
    process = GaussianProcess()
    process.fit(x, y, steps=20)
    peer = GaussianProcessRegressor(
        ConstantKernel(process.scale) * RBF(0.2), alpha=process.noise, optimizer=None
    ).fit(x[:, None].numpy(), (y - process.constant).numpy())
    places = torch.linspace(0, 1, 50, dtype=torch.float64)
    posterior = process.predict(x, y, places)
    mean, covariance = peer.predict(places[:, None].numpy(), return_cov=True)
    np.testing.assert_allclose(posterior.mean.numpy(), mean + process.constant, rtol=1e-6, atol=1e-9)
    variance = covariance.diagonal() + covariance[-1, -1] - 2 * covariance[:, -1]
    np.testing.assert_allclose(posterior.difference_variance.numpy(), variance, rtol=1e-6, atol=1e-9)
    assert process.log_likelihood(x, y) == pytest.approx(peer.log_marginal_likelihood_value_, rel=1e-6)


def test_a_state_goes_on_bit_for_bit():
    one, other = GaussianProcess(), GaussianProcess()
    one.fit(*curve(20))
    other.load_state_dict(one.state_dict())
    for process in (one, other):
        process.fit(*curve(30, seed=1))
    assert torch.equal(one.raw, other.raw)
