"""What a notebook shows of a report, a run folder and a plan; frames of them; numbers stay numbers."""

import json

import pytest

from conadv_lab.config import Config
from conadv_lab.displays import table
from conadv_lab.files import write_json
from conadv_lab.plan import Plan
from conadv_lab.runs import RunFolder
from conadv_lab.sharpness.measures.results import Measure, Report
from conadv_lab.sharpness.report.comparison import compare
from conadv_lab.sharpness.report.figures import figures

RUN = {"method": "conadv", "global_batch": 898, "test_accuracy": 97.5, "split": "train", "examples": 1000}


def report(**more) -> Report:
    facts = RUN | more
    return Report(
        (
            Measure("top_eigenvalue", 12.5, 0.25, 12, 0.5, facts),
            Measure(
                "sam_worst", {0.05: 0.1, 0.1: 0.5}, None, 0, 1.0, facts | {"one_step": {0.05: 0.1, 0.1: 0.4}}
            ),
            Measure("layer_traces", {"0": 3.0, "fc": 4.0}, {"0": 0.1, "fc": 0.2}, 9, 0.1, facts),
            Measure("landscape_line", {"axes": [[0.0, 1.0]], "losses": [1.0, 2.0]}, None, 0, 0.1, facts),
        )
    )


def test_radii_stay_numbers_in_frames_and_through_json():
    made = report()
    frame = made.to_frame()
    assert frame[frame["measure"] == "sam_worst"]["part"].tolist() == [0.05, 0.1]
    assert frame[frame["measure"] == "layer_traces"]["part"].tolist() == ["0", "fc"]
    assert frame["measure"].unique().tolist() == ["top_eigenvalue", "sam_worst", "layer_traces"]
    assert list(made.to_dict()["measures"][1]["value"]) == ["0.05", "0.1"]
    again = Report.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made


def test_a_report_shows_its_numbers_and_names_its_curves():
    shown = report()._repr_html_()
    for text in (
        "top_eigenvalue",
        "12.5",
        "± 0.2",
        "0.05",
        "in sharpness.figures: landscape_line",
        "examples 1,000",
    ):
        assert text in shown
    assert "on examples 1,000" in report(split=None)._repr_html_()
    assert "<script" not in table(["a"], [["<script>"]])


def test_a_reports_figures_come_from_one_call():
    drawn = figures({"conadv": report()})
    assert (
        list(drawn)
        == list(figures(report()))
        == ["Trace by layer", "Sharpness against ρ", "Loss along a random direction"]
    )
    assert drawn._repr_html_().count("<svg") == 3


def test_a_comparison_is_measures_by_runs_with_method_and_accuracy():
    frame = compare({"one": report(), "other": report(method="vanilla", test_accuracy=96.0)})
    assert frame.loc["method"].tolist() == ["conadv", "vanilla"]
    assert frame.loc["test accuracy (%)"].tolist() == [97.5, 96.0]
    assert frame.loc["sam_worst ρ=0.1"].tolist() == [0.5, 0.5]
    assert "layer_traces" not in " ".join(frame.index)


def test_a_run_folder_shows_how_far_it_is(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert "does not exist yet" in folder._repr_html_()
    folder.create(Config(), {"created": "today"})
    folder.append_metrics({"step": 4, "loss": 0.5})
    assert "logged up to step 5" in folder._repr_html_()
    assert folder.to_frame()["loss"].tolist() == [0.5]
    write_json(folder.path / "result.json", {"steps": 1200, "test_accuracy": 97.25})
    shown = folder._repr_html_()
    assert "finished after 1,200 steps" in shown
    assert "97.25" in shown


def test_a_plan_shows_gigabytes_and_keeps_bytes():
    plan = Plan(2, 0, 64.0, 0.0, 32, {"weights": 2_000_000_000}, {"code": 1_000_000_000}, 5_000_000)
    frame = plan.to_frame()
    assert frame[frame["quantity"] == "device memory, weights"]["value"].item() == 2e9
    assert "attackers" not in " ".join(frame["quantity"])
    shown = plan._repr_html_()
    assert "predicted, not measured" in shown
    assert "GB" in shown


@pytest.mark.parametrize("empty", [Report(()), compare({})])
def test_nothing_to_show_is_no_error(empty):
    assert empty._repr_html_()
