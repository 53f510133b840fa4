"""Tables as JSON and CSV, and pages: what cannot be said in a format is said otherwise, and nothing is left out."""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from conadv_lab import pages
from conadv_lab.outputs import Outputs, write_csv, write_json

matplotlib.use("Agg")


def test_json_holds_no_nan_and_no_keys_but_text(tmp_path):
    write_json(
        tmp_path / "a.json", {"x": [float("nan"), (1, np.float64(2))], 0.5: float("inf"), "p": Path("a")}
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [1, 2.0]], "0.5": None, "p": "a"}


def test_csv_is_what_pandas_writes(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": [0.1, float("nan")], "c": ["x, y", None], "d": [True, False]})
    Outputs(csv=tmp_path / "ours.csv").write(frame)
    frame.to_csv(tmp_path / "theirs.csv", index=False)
    assert (tmp_path / "ours.csv").read_text() == (tmp_path / "theirs.csv").read_text()
    write_csv(tmp_path / "none.csv", [])
    assert list(csv.reader((tmp_path / "none.csv").open())) == [[]]


def drawing() -> Figure:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="a line")
    axes.set_xlabel("x <units>")
    figure.legend()
    return figure


def test_a_figure_in_a_page_takes_the_pages_colour_and_width():
    text = pages.svg(pages.neutral(drawing()))
    opening = text[: text.index(">")]
    assert opening.startswith("<svg")
    assert "viewBox" in opening
    assert " width" not in opening
    assert " height" not in opening
    assert "currentColor" in text
    assert pages.NEUTRAL not in text


@pytest.mark.parametrize(
    "template", ["demo_report.html", "sharpness/report/page.html", "staleness/report/page.html"]
)
def test_pages_share_one_head_and_a_template_that_is_given_too_little_is_refused(template):
    text = (Path(pages.__file__).parent / template).read_text()
    assert text.startswith('{% extends "page.html" %}')
    with pytest.raises(UndefinedError):
        pages.render(template)


def test_a_page_is_written_at_once(tmp_path):
    pages.write(tmp_path / "page.html", "done")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
