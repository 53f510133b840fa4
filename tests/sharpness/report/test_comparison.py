"""Measures against outcomes over runs: Kendall's τ, its interval and its luck."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from conadv_lab.sharpness.measures.results import Measure, Report
from conadv_lab.sharpness.report.comparison import correlations, kendall_tau, scalars


def test_correlations_resample_seeds():
    rng = np.random.default_rng(0)
    reports = []
    for seed in range(5):
        for method in range(4):
            facts = {
                "run_seed": seed,
                "test_accuracy": 90 - method + 0.1 * rng.normal(),
                "train_test_gap": method,
            }
            noise = float(rng.normal())
            reports.append(
                Report(
                    (
                        Measure("trace", float(method), 0.0, 0, 0.0, facts),
                        Measure("luck", noise, 0.0, 0, 0.0, facts),
                    )
                )
            )
    found = {(c.measure, c.outcome): c for c in correlations(reports)}
    sure, luck = found["trace", "test_accuracy"], found["luck", "test_accuracy"]
    assert sure.tau < -0.8
    assert sure.low <= sure.tau <= sure.high < -0.7
    assert luck.low < 0 < luck.high
    assert (sure.runs, sure.seeds) == (20, 5)
    assert correlations(reports[:16])[0].low is None  # four seeds
    assert sure.luck < 0.01 < 0.05 < luck.luck
    three = {c.measure: c for c in correlations(reports[0:12:4])}  # one run a seed: any order is likely
    assert "trace" not in three  # the same in all three: no τ
    assert three["luck"].luck > 0.3


def test_kendalls_tau_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 6, (2, 9))
        assert kendall_tau(x, y) == pytest.approx(kendalltau(x, y).statistic, nan_ok=True)


def test_layers_with_numbers_for_names_are_no_radii():
    layers = Measure("layer_traces", {"0": 1.0, "3": 2.0}, None, 0, 0.0)
    keskar = Measure("keskar", {0.001: 3.0}, None, 0, 0.0)
    assert scalars(Report((layers, keskar))) == {"keskar ε=0.001": 3.0}
