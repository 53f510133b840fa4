"""The demo in small: every cell, the fixed form of its summary, a page that opens offline."""

import json
import re

import pytest

from conadv_lab import demo, demo_report


@pytest.fixture
def small(monkeypatch):
    """One batch, two steps, one seed, run in this process."""

    def in_this_process(jobs, folder, work):
        return {job: work(job, folder / demo._folder_name(job)) for job in jobs}

    monkeypatch.setattr(demo, "run_all", in_this_process)
    monkeypatch.setattr(demo, "BATCHES", (898,))
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))


def test_the_demo_leaves_summary_report_and_run_folders(small, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
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
    printed = capsys.readouterr().out
    assert all(
        re.search(rf"^{method} +898", printed, re.MULTILINE) for method in {*demo.PAIRED, *demo.EQUAL_COST}
    )
    runs = list((tmp_path / "demo" / "runs").iterdir())
    assert len(runs) == 2 * 10  # vanilla stands in two arms and is run once
    assert all((run / "sharpness.json").exists() for run in runs)


def test_a_second_demo_runs_nothing_anew(small, tmp_path):
    demo.main(["--out", str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    demo.main(["--out", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")} == before


def test_the_page_stands_alone(small, tmp_path):
    demo.main(["--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"http://(www\.w3\.org|creativecommons|purl)[^\"]*", "", page)
    assert "does not show that flatness" in " ".join(page.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
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


def test_findings_say_what_the_rows_hold():
    def row(method, arm, accuracy, top):
        return {
            "method": method,
            "arm": arm,
            "global_batch": 898,
            "seeds": 4,
            "lr": 0.1,
            "test_accuracy": {"mean": accuracy, "std": 0.2},
            "top_eigenvalue": {"mean": top, "std": 1.0},
        }

    rows = [
        row("conadv", "equal-epochs", 99.0, 5.0),
        row("vanilla", "equal-epochs", 98.0, 10.0),
        row("vanilla", "equal-steps", 98.0, 10.0),
        row("vanilla", "equal-arithmetic", 99.1, 2.5),
        row("copy-equal", "equal-steps", 98.4, 10.0),
        row("recycled-equal", "equal-steps", 98.5, 10.0),
    ]
    first, second, third, last = demo_report.findings(rows)
    assert "conadv against vanilla, +1.00 points" in first
    assert "standard error 0.14; more than twice its standard error" in first
    assert "0.50 times as large" in first
    assert "+0.50" in second
    assert "within twice its standard error" in third
    assert "at equal arithmetic, -0.10 points" in last
    assert "2.00 times as large" in last
