"""The demo in small: every cell, the fixed form of its summary, a page that opens offline."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest

from conadv_lab import demo, demo_report
from conadv_lab.pages import render


@contextlib.contextmanager
def small():
    """One batch, two seeds, a few steps, run in this process."""

    def in_this_process(jobs, folder, work):
        return {job: work(job, folder / demo._folder_name(job)) for job in jobs}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_all", in_this_process)
        patch.setattr(demo, "BATCHES", (898,))
        patch.setattr(demo, "EPOCHS", 3)
        patch.setattr(demo, "SEEDS", (0, 1))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, what was printed) of one small demo."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with small(), contextlib.redirect_stdout(printed):
        assert demo.main(["--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_the_demo_leaves_summary_report_and_run_folders(made):
    folder, printed = made
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"] > 0
    rows = summary["rows"]
    cells = {(row["method"], row["arm"], row["global_batch"]) for row in rows}
    assert len(cells) == len(rows) == 11
    assert {method for method, _, _ in cells} == {*demo.PAIRED, *demo.EQUAL_COST}
    assert {arm for _, arm, _ in cells} == set(demo_report.ARMS)
    for row in rows:
        assert row["seeds"] == 2
        assert 0 < row["test_accuracy"]["mean"] <= 100
        assert row["top_eigenvalue"]["mean"] > 0
        assert row["lr_times_eigenvalue"]["mean"] == pytest.approx(row["lr"] * row["top_eigenvalue"]["mean"])
    cost = {row["method"]: row["gradient_evaluations"] for row in rows}
    assert cost["conadv"] == cost["disadv"] == pytest.approx(8 / 3)
    assert cost["recycled"] == cost["noise"] == cost["copy"] == 2
    assert {cost[name] for name in ("vanilla", "recycled-equal", "noise-equal", "copy-equal")} == {1}
    steps = {row["method"]: row["steps"] for row in rows if row["arm"] == "equal-steps"}
    assert set(steps.values()) == {3}
    epochs = {row["method"]: row["epochs"] for row in rows if row["arm"] == "equal-steps"}
    assert epochs["vanilla"] == 3
    assert epochs["recycled-equal"] == pytest.approx(2)
    assert next(row["steps"] for row in rows if row["arm"] == "equal-arithmetic") == 8
    assert all(
        re.search(rf"^{method} +898", printed, re.MULTILINE) for method in {*demo.PAIRED, *demo.EQUAL_COST}
    )
    runs = list((folder / "runs").iterdir())
    assert len(runs) == 2 * 10  # vanilla stands in two arms and is run once
    assert all((run / "sharpness.json").exists() for run in runs)


@pytest.mark.slow
def test_a_second_demo_runs_nothing_anew(made):
    folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.json")}
    with small():
        demo.main(["--out", str(folder)])
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.json")} == before


@pytest.mark.slow
def test_the_page_stands_alone(made):
    folder, _ = made
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 8
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"http://(www\.w3\.org|creativecommons|purl)[^\"]*", "", page)
    words = " ".join(page.split())
    assert "does not show that flatness" in words
    assert words.index('class="lead"') < words.index("<svg") < words.index("<table")
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        accuracy = row["test_accuracy"]
        assert f"{accuracy['mean']:.2f} ± {accuracy['std']:.2f}" in page


def test_every_cell_has_a_learning_rate_from_the_same_grid():
    lines: dict = {}
    for row in demo.grid():
        lines.setdefault((row["method"], row["arm"], row["global_batch"]), []).append(row["lr"])
    assert set(lines) == {demo._key(cell) for cell in demo.cells()}
    assert all(tuple(rates) == demo.LEARNING_RATES for rates in lines.values())
    assert not set(demo.SEEDS) & set(demo.TUNING_SEEDS)


def test_the_best_rate_wins_and_of_equals_the_smaller(monkeypatch):
    rows = [
        {"method": "vanilla", "arm": "a", "global_batch": 8, "lr": lr, "test_accuracy": accuracy}
        for lr, accuracy in ((0.4, 99.0), (0.1, 98.0), (0.2, 99.0), (0.8, 90.0))
    ]
    monkeypatch.setattr(demo, "grid", lambda: rows)
    assert demo.best_learning_rates() == {("vanilla", "a", 8): 0.2}


def cell(method, arm, accuracy, top):
    return {
        "method": method,
        "arm": arm,
        "global_batch": 898,
        "seeds": 4,
        "lr": 0.1,
        "test_accuracy": {"mean": accuracy, "std": 0.2},
        "top_eigenvalue": {"mean": top, "std": 1.0},
    }


ROWS = [
    cell("conadv", "equal-epochs", 99.0, 5.0),
    cell("vanilla", "equal-epochs", 98.0, 10.0),
    cell("copy", "equal-epochs", 98.9, 10.0),
    cell("vanilla", "equal-steps", 98.0, 10.0),
    cell("vanilla", "equal-arithmetic", 99.1, 2.5),
    cell("copy-equal", "equal-steps", 98.4, 10.0),
    cell("recycled-equal", "equal-steps", 98.5, 10.0),
]


def test_differences_say_what_the_rows_hold():
    found = {(row["pair"], row["arm"]): row for row in demo_report.differences(ROWS)}
    first = found["conadv − vanilla", "equal epochs"]
    assert (round(first["points"], 6), round(first["error"], 3), first["clear"]) == (1.0, 0.141, True)
    assert first["eigenvalues"] == 0.5
    assert not found["conadv − copy", "equal epochs"]["clear"]
    assert found["recycled-equal − vanilla", "equal steps"]["points"] == 0.5
    last = found["conadv − vanilla", "equal arithmetic"]
    assert round(last["points"], 6) == -0.1
    assert last["eigenvalues"] == 2


def test_the_page_marks_the_clear_differences_alone():
    found = demo_report.differences(ROWS)
    empty = {"lead": "", "first": "", "pictures": [], "arms": [], "grid": {"rates": [], "lines": []}}
    page = render("demo_report.html", differences=found, seconds=1, seeds=4, date="", **empty)
    assert 0 < page.count('class="best"') == sum(row["clear"] for row in found) < len(found)


def test_the_page_begins_with_one_sentence_and_one_figure():
    assert demo_report.lead(ROWS) == (
        "With all 898 training images in one batch, ConAdv reaches 99.00 % test accuracy and vanilla 98.00 %; "
        "vanilla with as much arithmetic as ConAdv reaches 99.10 %."
    )


def test_fewer_runs_unless_all_are_asked_for():
    assert {cell.global_batch for cell in demo.cells(full=False)} == {64, 898}
    assert {cell.global_batch for cell in demo.cells()} == {64, 256, 898}
    assert {(cell.method, cell.arm) for cell in demo.cells(full=False)} == {
        (cell.method, cell.arm) for cell in demo.cells()
    }


def test_a_folder_that_cannot_be_made_is_refused_before_any_training(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 2
    assert "which is a file; pass the path of a folder as --out" in capsys.readouterr().err


def test_where_nobody_sees_a_bar_lines_say_how_far_it_is(monkeypatch, capsys):
    moments = iter([0.0, 30.0, 45.0])
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    done = [("a", {}), ("b", {}), ("c", {})]
    assert list(demo._progress(done, {"a": 2.0, "b": 1.0, "c": 1.0})) == done
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 runs, about 30 s left",
        "2 of 3 runs, about 15 s left",
        "3 of 3 runs",
    ]
