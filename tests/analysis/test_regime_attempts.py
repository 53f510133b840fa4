"""The attempts beside the map: fair budgets, one change at a time; and the causes, taken from the map's own runs."""

from dataclasses import replace

import pytest

from analysis import regime_attempts, regime_causes
from analysis.regime_cells import ATTEMPTS, FIRST, MAP, Cell
from analysis.study import Options
from analysis.tuning import Candidate, rungs
from conadv_lab.config import resolved
from conadv_lab.launch.sweep import identity

DEFAULTS = Candidate(1.0, 1.0, 1.0)


def options(folder, scale="smoke") -> Options:
    return Options(scale, folder, folder, folder / "runs", 1, from_results=False, finished=False)


@pytest.mark.parametrize("scale", ATTEMPTS)
def test_both_methods_are_tuned_with_the_same_budget(scale):
    for name, groups in regime_attempts.groups(scale, "data").items():
        budget = ATTEMPTS[scale][name].budget
        for cell in groups[0]:
            spent = sum(rungs(cell.count())) * cell.cost()
            assert spent <= budget * (1 + 1e-9) < spent + 4 * cell.cost(), name


def test_an_attempt_changes_what_its_label_says():
    base = Cell(MAP["small"], "conadv", 1_280, 24.0).config(DEFAULTS, 0)
    changed = {}
    for name, groups in regime_attempts.groups("small", "data").items():
        conadv = groups[0][1].config(DEFAULTS, 0)
        changed[name] = {
            field
            for section in ("data", "model", "method", "optimization", "training")
            for field, value in vars(getattr(conadv, section)).items()
            if value != vars(getattr(base, section))[field]
        }
    assert changed["tuned"] == set()
    assert changed["longer"] == {"steps", "warmup_steps"}
    assert "optimizer" in changed["lars"]
    assert not changed["lars"] & {"steps", "warmup_steps", "epsilon"}


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="--scale full has no attempts; allowed: smoke, small"):
        regime_attempts.groups("full", "data")


def test_causes_need_the_map(tmp_path):
    with pytest.raises(ValueError, match="holds no tuned cell; allowed: the folder of `python -m analysis"):
        regime_causes.chosen(options(tmp_path, "small"))


def test_slices_change_one_setting_and_share_the_tuned_run():
    scale = replace(MAP["smoke"], seeds=1)
    tuned = {
        cell: [cell.config(DEFAULTS, 0)]
        for cell in (Cell(scale, m, b, e) for m in FIRST for b in scale.batches for e in scale.epochs)
    }
    middle = tuned[Cell(scale, "conadv", scale.batches[1], scale.epochs[-1])][0]
    sliced = {(part, value): runs[0] for (part, value, _), runs in regime_causes.slices(tuned).items()}
    assert len(sliced) == len(regime_causes.EPSILONS) + len(regime_causes.TAUS)
    for (part, value), run in sliced.items():
        setting = run.method.epsilon / middle.method.epsilon if part == "epsilon" else run.method.staleness
        assert setting == pytest.approx(value)
        same = identity(resolved(run)) == identity(resolved(middle))
        assert same == (value == 1)
