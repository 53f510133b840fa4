"""The benchmark of a step in small: every row is there; nothing here depends on the clock."""

import pytest

from benchmarks import step


def test_methods_have_a_row_beside_vanilla_and_the_host_part_one_of_its_own(monkeypatch, tmp_path):
    assert {"sam", "asyncsam", "sampa", "msam", "extrap"} <= set(step.METHODS)
    monkeypatch.setattr(step, "WARM", 1)
    options = step.StepOptions(rounds=2, batch=16, methods=("conadv", "extrap"))
    rows = step.measure("digits-cnn", options, " digits-cnn")
    assert [(row.name, row.peer) for row in rows] == [
        ("overhead digits-cnn", "plain loop"),
        ("conadv digits-cnn", "vanilla"),
        ("extrap digits-cnn", "vanilla"),
    ]
    assert all(row.ratio is not None and row.ratio > 0 for row in rows)
    host = step.host_part("digits-cnn", tmp_path, steps=3)
    assert (host.name, host.unit) == ("host part, digits-cnn, 8 micro-batches", "µs")
    assert host.value > 0


def test_a_method_that_does_not_exist_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step", "--methods", "samm"])
    with pytest.raises(SystemExit, match="2"):
        step.main()
    assert capsys.readouterr().err.startswith("error: unknown method 'samm'; allowed: advprop, asam,")
