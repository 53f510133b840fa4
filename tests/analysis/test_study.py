"""Runs are found again, tables carry their origin, a conclusion stands only where the numbers bear it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis import study
from analysis.arms import Cell
from analysis.measuring import trained
from analysis.study import Options, Study, run_all
from conadv_lab.plots import differences

CONFIGS = [Cell("", "vanilla", 64, 2).config(0.1, seed) for seed in (0, 1)]


def given(tmp_path: Path, **changes) -> Options:
    settled = {"from_results": False, "finished": False, "processes": 1} | changes
    return Options("smoke", tmp_path, tmp_path, tmp_path / "runs", **settled)


def test_what_is_there_is_not_run_again(tmp_path):
    first = run_all(CONFIGS[:1], given(tmp_path), trained)
    (folder,) = (tmp_path / "runs").iterdir()
    folder.rename(tmp_path / "runs" / "as-a-sweep-named-it")
    asked = []

    def work(config, path):
        asked.append(config)
        return trained(config, path)

    found = run_all([*CONFIGS, CONFIGS[0]], given(tmp_path), work)
    assert asked == CONFIGS[1:]
    assert found[CONFIGS[0]] == first[CONFIGS[0]]
    assert set(found) == set(CONFIGS)


def test_a_run_that_a_sweep_trained_is_only_measured(tmp_path):
    trained(CONFIGS[0], tmp_path / "runs" / "lr=0.1")
    weights = (tmp_path / "runs" / "lr=0.1" / "result.json").read_text()
    found = run_all(CONFIGS[:1], given(tmp_path), trained)
    assert found[CONFIGS[0]] == json.loads(weights)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_commits_are_those_that_trained(tmp_path):
    run_all(CONFIGS[:1], given(tmp_path), trained)
    (manifest,) = (tmp_path / "runs").glob("*/manifest.json")
    told = json.loads(manifest.read_text())
    assert study.commits_of(CONFIGS, tmp_path / "runs") == str(told["commit"])
    manifest.write_text(json.dumps(told | {"commit": "an earlier one"}))
    assert study.commits_of(CONFIGS, tmp_path / "runs") == "an earlier one"


def test_finished_runs_alone(tmp_path):
    run_all(CONFIGS[:1], given(tmp_path), trained)
    assert set(run_all(CONFIGS, given(tmp_path, finished=True), trained)) == set(CONFIGS[:1])


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path):
    one = run_all(CONFIGS, given(tmp_path / "one"), trained)
    two = run_all(CONFIGS, given(tmp_path / "two", processes=2), trained)
    for config in CONFIGS:
        assert one[config]["parameters_sha256"] == two[config]["parameters_sha256"]


def small(claims) -> Study:
    def draw(rows):
        from matplotlib import pyplot as plt

        return plt.figure()

    return Study(
        "tiny", "A question.", lambda given: (pd.DataFrame({"x": [1.0, 2.0]}), {"runs": 2}), draw,
        lambda rows: {"mean": rows["x"].mean()}, "It is {mean}.", claims,
    )  # fmt: skip


def test_a_study_leaves_table_manifest_figure_and_conclusion(tmp_path, capsys):
    own = small({"positive": lambda numbers: numbers["mean"] > 0})
    words = ["--scale", "smoke", "--out", str(tmp_path)]
    assert own.main(words) == 0
    assert "It is 1.5." in capsys.readouterr().out
    manifest = json.loads((tmp_path / "tiny.json").read_text())
    assert manifest["command"] == "python -m analysis.tiny --scale smoke"
    assert {"date", "commit", "machine", "runs", "wall_seconds"} <= manifest.keys()
    assert (tmp_path / "tiny.png").stat().st_size > 0
    (tmp_path / "tiny.csv").write_text("x\n-1.0\n")
    assert own.main([*words, "--from-results"]) == 0
    assert "not supported by this table: positive" in capsys.readouterr().out


def test_a_claim_about_what_a_smaller_scale_lacks_is_told(tmp_path):
    own = small({"ahead": lambda numbers: numbers["absent"] > 0})
    assert "lacks data for it: 'absent'" in own.told(pd.DataFrame({"x": [1.0]}))


def test_a_table_that_is_not_there_is_told(tmp_path, capsys):
    assert small({}).main(["--from-results", "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_only_the_full_scale_writes_where_the_committed_results_lie():
    assert study.options("x", "", ["--scale", "full"]).out == study.RESULTS
    assert study.options("x", "", ["--scale", "full", "--out", "a"]).pictures == Path("a")
    assert "runs" in study.options("x", "", []).out.parts


def test_what_differs_and_what_does_not_look_different():
    from matplotlib import pyplot as plt

    from analysis.estimates import mean

    figure, ax = plt.subplots()
    shown = {"clear": mean([1.0, 1.1, 1.2], "difference"), "open": mean([-1.0, 1.1], "difference")}
    differences(shown, "points", ax=ax)
    markers = [line.get_marker() for line in ax.lines if line.get_marker() in "os"]
    assert markers == ["o", "s"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["clear  (n = 3)", "open  (n = 2)"]
    plt.close(figure)
