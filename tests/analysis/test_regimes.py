"""The map's runner: the same budget for all, a balanced picture at every stop, the same table after any kill."""

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis import regimes
from analysis.regime_cells import MAP, TUNING_SEED, Cell, Scale, cells
from analysis.regimes import STUDY, figures_in, tables, work_through
from analysis.regimes_told import lead, numbers, said, standing
from analysis.study import Options, table
from analysis.tuning import Candidate, affordable, candidates, rungs, search
from conadv_lab.config import resolved
from conadv_lab.runs import write_json

SMOKE = MAP["smoke"]
ROOT = Path(__file__).parents[2]


def options(folder, processes=1) -> Options:
    return Options("smoke", folder, folder, folder / "runs", processes, from_results=False, finished=False)


def made_up(config, path):
    """Figures that depend on the config alone: best at 1.5 times the default rate, worse with more decay."""
    lr, decay = resolved(config).optimization.lr, config.optimization.weight_decay
    accuracy = 90 - abs(math.log(lr / 0.15)) - decay + 0.01 * config.training.seed
    figures = {
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy / 100,
        "train_accuracy": 99.0,
        "train_loss": 0.1,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", resolved(config).to_dict())
    return figures | {"steps": config.training.steps, "seconds": 0.0}


def test_every_method_has_the_same_budget():
    for scale in MAP.values():
        for cell in (cell for group in cells(scale) for cell in group):
            spent = sum(rungs(cell.count())) * cell.cost()
            assert spent <= scale.budget * (1 + 1e-9)
            assert sum(rungs(cell.count() + 1)) * cell.cost() > scale.budget
    vanilla, conadv = (Cell(MAP["full"], method, 2_048, 10.0) for method in ("vanilla", "conadv"))
    assert conadv.cost() / vanilla.cost() == pytest.approx(8 / 3)
    assert vanilla.count() > conadv.count() >= 2


def test_the_readings_of_equal():
    epochs, arithmetic, depth = (
        Cell(MAP["full"], "vanilla", 2_048, 10.0, e) for e in ("epochs", "arithmetic", "depth")
    )
    conadv = Cell(MAP["full"], "conadv", 2_048, 10.0)
    assert arithmetic.cost() == pytest.approx(conadv.cost(), rel=0.01)
    drawn = epochs.candidates()[0]
    one, longer, wider = (cell.config(drawn, 0).training for cell in (epochs, arithmetic, depth))
    assert longer.steps == pytest.approx(8 / 3 * one.steps, abs=1)
    assert (wider.steps, wider.global_batch) == (one.steps, round(8 / 3 * 2_048))


def test_draws_are_shared_and_halving_keeps_the_best():
    shared = [(c.lr, c.weight_decay) for c in candidates(5, 0, tunes_epsilon=True)]
    assert shared == [(c.lr, c.weight_decay) for c in candidates(9, 0, tunes_epsilon=False)][:5]
    truth = {number: 80.0 + number for number in range(6)}
    scores: dict = {}
    while True:
        wanted, best = search(6, scores)
        if best is not None:
            break
        scores |= {(number, fold): (truth[number], 0.0) for number, fold in wanted}
    assert best == 5
    assert Counter(fold for _, fold in scores) == {0: 6, 1: 3, 2: 2}
    assert affordable(1, 100) == 1  # the default needs no trial


def test_a_stop_at_any_time_leaves_a_balanced_picture(tmp_path):
    scale = replace(SMOKE, methods=(("vanilla", "conadv"), ("noise",)))
    ran = []

    def recorded(config, path):
        ran.append((config.training.seed, config.method.method, config.training.global_batch))
        return made_up(config, path)

    assert work_through(cells(scale), scale, options(tmp_path), math.inf, recorded)
    first, readings, longer, _, noise, _ = cells(scale)[:6]
    tuning = sum(sum(rungs(cell.count())) for cell in first)
    assert all(seed >= TUNING_SEED for seed, *_ in ran[:tuning])
    for seed in range(scale.seeds):
        own = ran[tuning + seed * len(first) : tuning + (seed + 1) * len(first)]
        assert {number for number, *_ in own} == {seed}
        assert Counter(batch for *_, batch in own) == dict.fromkeys(scale.batches, 2)
    assert {cell.epochs for cell in first + readings} == {2.0} != {cell.epochs for cell in longer}
    assert {cell.equal for cell in first} == {"epochs"}
    assert {cell.equal for cell in readings} == {"arithmetic", "depth"}
    assert {cell.method for cell in noise} == {method for _, method, _ in ran[-len(noise) :]} == {"noise"}


def test_cells_of_the_small_scale_along_a_diagonal_take_equal_steps():
    steps = {
        (b, e): Cell(MAP["small"], "vanilla", b, e).config(Candidate(1.0, 1.0, 1.0), 0).training.steps
        for b in MAP["small"].batches
        for e in MAP["small"].epochs
    }
    assert steps[80, 6.0] == steps[320, 24.0] == 96
    assert steps[320, 6.0] == steps[1_280, 24.0] == 24
    assert [Cell(MAP["small"], m, 320, 6.0).count() for m in ("vanilla", "conadv")] == [4, 2]


def test_killed_at_any_run_it_ends_with_the_same_table(tmp_path):
    groups = cells(SMOKE)

    class Killed(BaseException):
        """Stands for a kill."""

    def finished_tables(folder):
        return tables(groups, "smoke", figures_in(folder / "runs"))

    assert work_through(groups, SMOKE, options(tmp_path / "whole"), math.inf, made_up)
    whole = finished_tables(tmp_path / "whole")
    for limit in (1, 5, 7, 11):
        left = iter(range(limit))

        def until(config, path, left=left):
            if next(left, None) is None:
                raise Killed
            return made_up(config, path)

        with pytest.raises(Killed):
            work_through(groups, SMOKE, options(tmp_path / "killed"), math.inf, until)
        assert len(finished_tables(tmp_path / "killed")[0]) <= len(whole[0])
    assert not work_through(groups, SMOKE, options(tmp_path / "killed"), -math.inf, made_up)
    assert work_through(groups, SMOKE, options(tmp_path / "killed"), math.inf, made_up)
    for one, other in zip(whole, finished_tables(tmp_path / "killed"), strict=True):
        pd.testing.assert_frame_equal(one, other)
    rows = whole[0]
    assert list(rows.columns[:7]) == [
        "method",
        "global_batch",
        "epochs",
        "equal",
        "seed",
        "lr",
        "test_accuracy",
    ]
    assert len(rows) == sum(map(len, groups)) * SMOKE.seeds


def test_without_time_nothing_runs_and_the_table_is_empty(tmp_path, capsys):
    words = ["--scale", "smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--minutes", "0"]
    assert STUDY.main(words) == 0
    assert not (tmp_path / "runs").exists()
    assert not json.loads((tmp_path / "regimes.json").read_text())["complete"]
    assert "not measured" in STUDY.numbers(table("regimes", tmp_path))["others"]
    assert "lacks data" in capsys.readouterr().out


def test_a_lead_is_called_by_where_its_interval_lies():
    rows = pd.DataFrame(
        [
            {"method": method, "global_batch": 320, "epochs": 6.0, "equal": "epochs", "seed": seed, "scale": "small",
             "test_accuracy": 50 + seed + (method == "conadv") * shift, "train_accuracy": 60.0, "train_loss": 1.0}
            for seed in range(3) for method, shift in (("vanilla", 0.0), ("conadv", 1 + 0.1 * seed))
        ]
    )  # fmt: skip
    assert str(lead(rows, (320, 6.0))) == "+1.10 (+0.85 to +1.35)"
    assert standing(lead(rows, (320, 6.0))) == "ahead"
    assert said(rows, (320, 24.0), "epochs") == "not measured"
    assert said(rows, (1_280, 6.0), "depth") == "beyond the set"
    assert numbers(rows)["epochs_ahead"] == 1


IN_SMALL = """
import sys
from dataclasses import replace
from analysis import regimes
regimes.MAP["smoke"] = replace(regimes.MAP["smoke"], batches=(898,), epochs=(2.0,), seeds=6)
sys.exit(regimes.STUDY.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eight times it imports torch in three processes
def test_the_command_killed_five_times_at_random_moments_ends_with_the_same_table(tmp_path):
    chance = random.Random(17)

    def begun(folder, processes) -> subprocess.Popen:
        words = ["--scale", "smoke", "--processes", processes, "--runs", folder / "runs", "--out", folder]
        return subprocess.Popen([sys.executable, "-c", IN_SMALL, *words], cwd=ROOT)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for _ in range(5):
        process, before = begun(killed, "2"), len(list(killed.glob("runs/*")))
        while len(list(killed.glob("runs/*"))) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, "the command ended before it could be killed"
        process.kill()
        process.wait()
    assert begun(killed, "2").wait() == begun(whole, "1").wait() == 0
    for name in ("regimes.csv", "regimes_tuning.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_every_config_of_every_scale_can_run():
    for scale in (MAP["small"], MAP["full"]):
        for group in cells(scale, ["free-at", "sam"]):
            for cell in group:
                drawn = cell.candidates()[-1]
                for config in (cell.config(drawn, 0), cell.trial(drawn, 0)):
                    assert resolved(config).training.steps >= 1


def test_a_run_that_diverges_is_a_result(tmp_path):
    cell = Cell(SMOKE, "vanilla", 898, 4.0)
    config = cell.config(Candidate(1e20, 1.0, 1.0), 0)
    figures = regimes.attempted(config, tmp_path / "run")
    assert (figures["test_accuracy"], figures["diverged"]) == (0.0, True)


def test_the_command_really_trains_and_takes_a_method_of_ones_own(tmp_path, monkeypatch):
    own = tmp_path / "own.py"
    own.write_text("from conadv_lab.methods.base import Vanilla\n\ndef mine(config):\n    return Vanilla()\n")
    tiny = Scale(SMOKE.recipe, 898, SMOKE.fold, True, (898,), (1.0,), (("conadv",),), 1, 6.0)
    monkeypatch.setitem(MAP, "smoke", tiny)
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--method", f"{own}:mine"]
    assert STUDY.main([*words, "--scale", "smoke"]) == 0
    rows = table("regimes", tmp_path / "out")
    assert set(rows["method"]) == {"conadv", "vanilla", f"{own}:mine"}
    log = pd.read_csv(tmp_path / "out" / "regimes_tuning.csv")
    assert log.groupby(["method", "equal"])["chosen"].any().all()
    assert json.loads((tmp_path / "out" / "regimes.json").read_text())["complete"]
    assert (tmp_path / "out" / "regimes.png").exists()
    assert not STUDY.main([*words, "--scale", "smoke", "--from-results"])
