"""Slow-down of each device in each step: independent factors, one column per device."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from conadv_lab.seeds import derived_seed
from conadv_lab.staleness.timeline.cluster import Stragglers

BLOCK = 1 << 18
"""Number of factors generated at a time (2 MB), to stay in the processor's cache."""


def factors(noise: Stragglers, steps: int, devices: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of (some steps, devices) factors, ``steps`` rows in total; a block's values depend only on its number."""
    rows = max(1, BLOCK // devices)
    slow = np.ones(devices)
    slow[: noise.slow_devices] = noise.slow_factor
    for number, first in enumerate(range(0, steps, rows)):
        shape = (min(rows, steps - first), devices)
        draw = np.random.Generator(np.random.SFC64(derived_seed(seed, "stragglers", number)))
        yield _drawn(noise, draw, shape, slow)


def _drawn(
    noise: Stragglers, draw: np.random.Generator, shape: tuple[int, int], slow: NDArray[np.float64]
) -> NDArray[np.float64]:
    if noise.kind == "lognormal" and noise.spread > 0:
        values = draw.standard_normal(shape)
        values *= noise.spread
        values -= noise.spread**2 / 2
        np.exp(values, out=values)
    elif noise.kind == "exponential" and noise.spread > 0:
        values = draw.standard_exponential(shape)
        values *= noise.spread
        values += 1
    else:
        return np.broadcast_to(slow, shape)
    if noise.slow_devices and noise.slow_factor != 1:
        values *= slow
    return values


@lru_cache(maxsize=256)
def mean_slowest(noise: Stragglers, devices: int) -> float:
    """Mean of the largest of ``devices`` factors, without slow devices.

    Shifted exponential: 1 + spread · H_n (Rényi's representation). Log-normal: the quantile function at u^(1/n),
    averaged over u in (0, 1).

    >>> mean_slowest(Stragglers("exponential", 0.5), 2)
    1.75
    """
    if noise.kind == "exponential":
        return 1 + noise.spread * float((1 / np.arange(1, devices + 1)).sum())
    if noise.kind == "lognormal":
        middle = (np.arange(20_000) + 0.5) / 20_000
        quantile = -ndtri(-np.expm1(np.log(middle) / devices))
        return float(np.exp(noise.spread * quantile - noise.spread**2 / 2).mean())
    return 1.0
