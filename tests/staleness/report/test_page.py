"""The page: everything is on it, and it needs nothing beside it."""

import json

import numpy as np
import pandas as pd
import pytest

from conadv_lab.staleness.report import page as report
from conadv_lab.staleness.report import tables
from conadv_lab.staleness.timeline.cluster import load
from conadv_lab.staleness.timeline.workload import WORKLOADS


@pytest.fixture(scope="module")
def page():
    return report.build("h100", WORKLOADS["imagenet-resnet50-4k"], devices=16, dynamics=dynamics_rows())


def dynamics_rows():
    about = {
        "problem": "digits",
        "draw": "constant",
        "workers": 1,
        "seed": 0,
        "lr": 0.1,
        "step": 8,
        "worker": 0,
    }
    return pd.DataFrame(
        {**about, "tau": tau, "effective_tau": tau, "tau_lr": tau / 10, "phase": phase, "measure": name, "value": value}
        for tau in (0, 1, 4)
        for name, phase, value in (
            ("test_accuracy", "whole", 90.0 + tau), ("top_eigenvalue", "whole", 1.0 + tau),
            ("sign_agreement", "late", 1 - tau / 10),
        )
    )  # fmt: skip


def test_the_page_holds_everything_and_needs_nothing(page):
    names = [picture.name for picture in page.pictures]
    assert names == ["gantt", "images", "devices", "tau", "fit", "dynamics", "probes"]
    assert page.html.count("<svg") == len(names)
    assert "predicted by a model" in page.html
    assert "http://" not in page.html.replace("http://www.w3.org", "").replace("http://creativecommons", "")
    assert "src=" not in page.html
    assert "held out" in page.html
    assert "+12.3 %" in page.html  # the largest residual is not hidden


def test_the_page_gives_the_simple_models_numbers_from_its_assumptions():
    for row in tables.simple(load("h100"), WORKLOADS["imagenet-resnet50-32k"]):
        quoted, same, *_ = row["cells"][:4]
        assert same == pytest.approx(quoted, abs=0.006)
        quoted, same, joint, apart = row["cells"][4:]
        assert same == pytest.approx(quoted, abs=0.006)
        assert apart <= joint + 0.01


def test_rows_behind_the_page(page):
    assert set(page.rows["table"]) == {"what if", "images per device", "devices", "effective tau"}
    assert set(page.rows["line"]) == {
        "vanilla", "disadv", "stream", "ranks", "spare", "recycled", "recycled-equal",
    }  # fmt: skip
    by_tau = page.rows[page.rows["table"] == "effective tau"]
    assert by_tau.groupby(["tau", "share"])["part"].sum().to_numpy() == pytest.approx(1)
    np.testing.assert_allclose(by_tau["share"], by_tau["attackers"] / by_tau["devices"])
    if_what = page.rows[page.rows["table"] == "what if"]
    first = tables.summary(if_what)[0]
    own = if_what[if_what["what"] == "unchanged"].set_index("line")
    faster = own.loc[["stream", "ranks"], "step_ms"].min()
    assert first["speed_up"] == pytest.approx(own.loc["disadv", "step_ms"] / faster)
    assert (
        first["conadv_hours"] == own.loc[["stream", "ranks"]].sort_values("step_ms")["device_hours"].iloc[0]
    )
    assert page.rows["devices"].max() == 8192  # a spare device for each of 4,096
    wide = page.rows[page.rows["table"] == "devices"].pivot_table("step_ms", "workers", "line")
    assert (wide["stream"] < wide["disadv"]).all()
    assert (wide["vanilla"] < wide["recycled"]).all()


def test_tables_of_the_dynamics_are_read_or_refused(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": dynamics_rows().to_dict("records")}))
    pd.testing.assert_frame_equal(report.read_rows(file), dynamics_rows(), check_like=True)
    short = dynamics_rows().drop(columns=["measure", "value"])
    file.write_text(json.dumps({"rows": short.to_dict("records")}))
    with pytest.raises(ValueError, match="lacks the columns measure, value"):
        report.read_rows(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a table of the dynamics"):
        report.read_rows(file)
