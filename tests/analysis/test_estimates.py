"""Intervals against SciPy, pairs seed by seed, and how a number is written."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.estimates import cell_mean, difference, mean, ratio, rows_of

ROWS = pd.DataFrame(
    {
        "method": ["a", "a", "a", "b", "b", "b"],
        "seed": [0, 1, 2, 2, 1, 3],
        "figure": [1.0, 2.0, 4.0, 1.0, 1.5, 99.0],
    }
)
A, B = {"method": "a"}, {"method": "b"}


def test_the_interval_is_scipys():
    values = [97.2, 98.1, 97.9, 98.4]
    found = mean(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.n == 4


def test_pairs_are_made_by_seed_and_only_of_seeds_that_both_have():
    found = difference(ROWS, A, B, "figure")
    assert found.n == 2
    assert found.value == pytest.approx(((2.0 - 1.5) + (4.0 - 1.0)) / 2)
    assert ratio(ROWS, A, B, "figure").value == pytest.approx(math.sqrt(2.0 / 1.5 * 4.0))


def test_a_difference_that_all_seeds_share_has_a_narrow_interval():
    noise = [0.0, 5.0, -3.0]
    rows = pd.concat(
        pd.DataFrame(
            {"method": m, "seed": range(3), "figure": [x + shift + 1e-3 * i for i, x in enumerate(noise)]}
        )
        for m, shift in (("a", 1.0), ("b", 0.0))
    )
    assert difference(rows, A, B, "figure").above
    assert not cell_mean(rows, A, "figure").above


def test_what_stands_out():
    assert mean([1.0, 1.1, 1.2], "difference").above
    assert mean([0.1, 0.2, 0.3], "ratio").below
    assert mean([-1.0, 1.1], "difference").open


def test_how_numbers_are_written():
    assert str(mean([1.0, 2.0], "mean")) == "1.50 ± 6.35"
    assert str(mean([-1.0, -2.0], "difference")) == "−1.50 (−7.85 to +4.85)"
    assert str(mean([2.0], "ratio")) == "2.00"


def test_a_cell_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="no row has"):
        rows_of(ROWS, method="c")
    with pytest.raises(ValueError, match="seeds"):
        difference(ROWS[ROWS["seed"] != 2].query("seed != 1"), A, B, "figure")
