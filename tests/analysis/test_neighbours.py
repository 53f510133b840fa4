"""The study of the neighbours treats all alike: one budget of trials, and equal arithmetic in the arm that says so."""

import pytest

from analysis.neighbours import BATCH, SCALES, SHOWN, cells, trials
from conadv_lab.config import resolved
from conadv_lab.methods import method_of

RATES = SCALES["full"].rates


@pytest.mark.parametrize("method", SHOWN)
def test_every_method_has_nine_trials_that_work(method):
    own = trials(method, RATES)
    assert len(set(own)) == 9
    (cell, *_) = [cell for cell in cells(SCALES["full"]) if cell.method == method]
    for trial in own:
        config = resolved(cell.tuning(trial.lr, 100).replace(**trial.changes))
        assert config.optimization.lr == trial.lr


def test_equal_arithmetic_is_equal():
    for cell in cells(SCALES["full"]):
        cost = method_of(cell.config(0.1, 0)).gradient_evaluations * cell.steps
        if cell.arm == "equal-arithmetic":
            assert cost == pytest.approx(8 / 3 * 56, rel=0.03), cell
        else:
            assert cell.steps == 56
        assert cell.global_batch == BATCH


def test_radii_are_of_what_moves():
    options = {method: trials(method, RATES)[0].option for method in SHOWN}
    assert options["vanilla"] == ""
    assert options["sam"] == options["msam"] == options["late-sam"] == "rho"
    assert options["extrap"] == "extrapolation"
    assert options["conadv"] == options["recycled"] == "epsilon"
