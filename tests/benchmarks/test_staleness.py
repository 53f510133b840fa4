"""The staleness benchmark compares the right things; nothing here depends on the clock."""

import pytest

from benchmarks.staleness import device_rows, event_rows, published_rows
from conadv_lab.staleness.timeline.calibrate import TOLERANCE


def test_a_row_a_published_line_with_predicted_over_measured():
    rows = published_rows()
    assert [row.name.split(" devices")[0] for row in rows] == [
        "h100 8", "h100 16", "h100 32", "h100 64", "h100 512", "h100 768", "h100 3584",
        "a100 8", "a100 64", "a100 1024", "a100 4216",
    ]  # fmt: skip
    assert rows[0].ratio == pytest.approx(rows[0].value / 57.07)
    for row in rows:
        assert abs(row.ratio - 1) <= TOLERANCE[row.name[:4]]


def test_a_row_a_step_of_one_device_captured_or_eager():
    rows = {row.name: row for row in device_rows()}
    assert len(rows) == 43
    held_out = rows["h200, 4 images, conadv, capture on, beside all, held out"]
    assert held_out.ratio == pytest.approx(held_out.value / 5.64)


def test_the_events_beside_it_are_the_same_cluster(monkeypatch):
    monkeypatch.setattr("benchmarks.staleness.DEVICES", 64)  # 4,096 take seconds
    rows = event_rows(1.0, rounds=1)  # raises where the two differ
    assert [row.name for row in rows][:2] == ["device-step", "device-step of SimPy"]
