"""The bound holds where it is measured, grows with τ, and says nothing where its conditions do not hold."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from conadv_lab.staleness.draws import Draw
from conadv_lab.staleness.theory import command
from conadv_lab.staleness.theory.bound import Constants, bound, bound_of_bounded_steps
from conadv_lab.staleness.theory.compare import compare, constants_of
from conadv_lab.staleness.theory.quadratic import example, simulate

PROBLEM = example()
START = np.full(8, 0.5)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return compare(PROBLEM, START, steps=2000)


def test_measured_stays_under_the_bound_for_every_tau_and_three_step_sizes(rows):
    assert (len(rows), rows["lr"].nunique(), sorted(rows["tau"].unique())) == (51, 3, list(range(17)))
    assert (rows["measured"] < rows["bound"]).all()
    assert (rows["measured"] < rows["bound_of_bounded_steps"]).all()
    assert (rows["measured"] > 0.1 * rows["bound"]).all()  # and is not far below it


def test_the_bound_and_the_measurement_grow_with_staleness(rows):
    largest = rows[rows["lr"] == rows["lr"].max()].sort_values("tau")
    for _, own in rows.groupby("lr"):
        assert (np.diff(own.sort_values("tau")["bound"]) > 0).all()
    assert largest["bound"].iloc[-1] > 2 * largest["bound"].iloc[0]
    assert (np.diff(largest["measured"]) > 0).all()
    assert (np.diff(largest["late"]) > 0).all()


def test_the_floor_of_an_inexact_solver_is_in_the_bound():
    rows = compare(PROBLEM, START, (0, 8, 16), steps=500, solvers=("ascent", "sign"))
    assert (rows["measured"] < rows["bound"]).all()
    assert (rows["bound"] > rows["floor"]).all()
    floors = rows.groupby("solver")["floor"].first()
    # 2 w₂² L_θx² dε² for the sign step, whatever the step size; 4⁻³ of it after three halvings
    assert floors["sign"] == pytest.approx(2 * 8)
    assert floors["ascent"] == pytest.approx(2 * 8 / 64)


def test_one_sign_step_suffers_more_from_staleness_than_a_maximiser():
    rows = compare(PROBLEM, START, (0, 16), (0.03,), steps=1000, solvers=("exact", "sign"))
    late = rows.set_index(["solver", "tau"])["late"]
    assert late["sign", 16] / late["sign", 0] > 20
    assert late["exact", 16] / late["exact", 0] < 2


@pytest.mark.parametrize(
    "draw", [Draw("geometric", 2.0, workers=4), Draw("per-worker", of_workers=(0, 4, 12))]
)
def test_drawn_staleness_enters_by_its_mean_and_its_largest(draw):
    taus = draw.array(2000, seed=0)
    effective = np.minimum(taus, np.arange(2000)[:, None])
    constants = constants_of(PROBLEM, START)
    lr = constants.largest_lr(int(taus.max()))
    above = bound(constants, lr, 2000, int(taus.max()), effective.mean())
    measured = simulate(PROBLEM, START, lr, taus).squared_gradients.mean()
    assert 0.1 * above < measured < above < bound(constants, lr, 2000, int(taus.max()))


def test_a_larger_batch_lowers_noise_and_the_cost_of_staleness():
    constants = [constants_of(example(batch=batch), START) for batch in (1, 100)]
    growth = [bound(c, 0.03, 2000, 16) - bound(c, 0.03, 2000, 0) for c in constants]
    assert growth[0] == pytest.approx(100 * growth[1])


def test_figures_by_hand():
    c = Constants(0.5, 2.0, 1.0, 4.0, weights=(1.0, 3.0), variance=8.0, batch=2, excess=6.0, gap=1.0)
    assert c.kappa == 3 * 2 * 1 / 4
    assert c.smoothness == 4 * 0.5 + 1.5
    assert c.floor == 3 * 2 * 0.5
    assert bound(c, 0.1, 60, 2, 1.0) == pytest.approx(12 / 6 + 4 * (0.35 + 4 * 2.25 * 0.01) + 18)
    assert bound_of_bounded_steps(c, 0.1, 60, 2, 0.5) == pytest.approx(12 / 6 + 4 * 0.35 + (1.5 + 3) ** 2)


def test_the_bound_is_silent_above_the_largest_step():
    c = Constants(0.5, 1.0, 1.0, 1.0, excess=1.0)
    for tau in (0, 1, 16):
        edge = c.largest_lr(tau)
        assert c.smoothness * edge + 4 * (c.kappa * edge * tau) ** 2 == pytest.approx(1)
        assert math.isfinite(bound(c, edge, 10, tau))
        assert math.isnan(bound(c, edge * 1.001, 10, tau))
    assert c.largest_lr(0) == pytest.approx(1 / c.smoothness)
    assert math.isfinite(bound_of_bounded_steps(c, c.largest_lr(0), 10, 16, 0.1))
    assert math.isnan(bound_of_bounded_steps(c, c.largest_lr(0) * 1.001, 10, 16, 0.1))


def test_the_rate_is_one_over_the_root_of_the_steps():
    """docs/theory.md, corollary: staleness stands in terms that fall as 1/T."""
    c = Constants(0.1, 1.0, 1.0, 1.0, variance=1.0, excess=1.0)
    costs = []
    for steps in (10**6, 10**8):
        lr = min(c.largest_lr(16), math.sqrt(2 * c.excess / (c.smoothness * c.variance * steps)))
        fresh, stale = bound(c, lr, steps, 0), bound(c, lr, steps, 16)
        assert fresh == pytest.approx(2 * math.sqrt(2 * c.smoothness / steps))
        costs.append(stale - fresh)
    assert costs[0] == pytest.approx(100 * costs[1])


def test_the_command_prints_a_table_and_writes_its_rows(tmp_path, capsys):
    out = {kind: tmp_path / f"theory.{kind}" for kind in ("json", "csv", "png")}
    words = ["--taus", "0", "16", "--steps", "300", "--replicas", "8", "--lrs", "0.01", "0.05"]
    words += ["--json", str(out["json"]), "--csv", str(out["csv"]), "--figure", str(out["png"])]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert "measured above the bound: 0 of 3" in printed
    assert "not covered" in printed  # 0.05 at τ = 16
    assert "The theorem does not cover practice" in printed
    found = json.loads(out["json"].read_text())["rows"]
    assert {row["solver"] for row in found} == {"exact", "sign"}
    assert [row["bound"] is None for row in found[:4]] == [False, False, False, True]
    assert len(pd.read_csv(out["csv"])) == len(found) == 8
    assert out["png"].stat().st_size > 5000


MISTAKES = {
    "negative": (["--taus", "-1"], "tau is -1; allowed: a whole number of at least 0"),
    "no steps": (["--steps", "0"], "steps is 0"),
    "no replicas": (["--replicas", "0"], "replicas is 0"),
    "no step": (["--lrs", "0"], "lr is 0.0; allowed: a number above 0"),
    "noise": (["--noise", "-1"], "noise is -1.0; allowed: at least 0"),
    "size": (["--size", "0"], "size is 0"),
    "solver": (
        ["--solver", "exat"],
        "unknown solver 'exat'; allowed: ascent, exact, sign. Did you mean 'exact'?",
    ),
    "folder": (["--csv", "nowhere/out.csv"], "nowhere/out.csv cannot be written"),
    "picture": (["--figure", "out.bmp"], "out.bmp"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_a_sentence_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[name]
    assert command.main([*words, "--json", "out.json"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
