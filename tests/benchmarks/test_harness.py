"""The benchmarks' shared harness, on known times; nothing here depends on the clock."""

import json

import pytest

from benchmarks.harness import Row, Times, interleaved, publish


def test_ratio_is_the_median_over_pairs_not_of_medians():
    times = Times({"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 10.0, 6.0]})
    row = times.row("ours", peer="theirs")
    assert (row.value, row.unit, row.ratio, row.spread) == (3000.0, "ms", 0.5, (0.5, 1.25))
    assert times.row("theirs") == Row("theirs", 6000.0, "ms")


def test_calls_are_interleaved_in_alternating_order():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_repeated_calls_share_their_time():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, repeats=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 2, "b": 2}


def test_one_round_is_refused():
    with pytest.raises(ValueError, match="rounds is 1; allowed: a whole number of at least 2"):
        interleaved({}, rounds=1)


def test_publishes_a_table_and_the_agreed_json(tmp_path, capsys):
    file = tmp_path / "figures.json"
    publish([Row("ours", 1.5, "ms", "theirs", 0.5, (0.4, 0.6)), Row("theirs", 3.0, "ms")], file)
    written = json.loads(file.read_text())
    assert written["rows"] == [
        {"name": "ours", "value": 1.5, "unit": "ms", "peer": "theirs", "ratio": 0.5},
        {"name": "theirs", "value": 3.0, "unit": "ms", "peer": None, "ratio": None},
    ]
    assert {"cpu", "cores", "torch"} <= set(written["machine"])
    assert "0.500 (0.400–0.600) × theirs" in capsys.readouterr().out
