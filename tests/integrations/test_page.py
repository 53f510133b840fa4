"""The pages' examples run with the real libraries, each under 40 lines, and the table is of what ran."""

import sys
from importlib.metadata import version

import pytest

from tests.docs.pages import ROOT
from tests.integrations import examples
from tests.integrations.conftest import works_with
from tests.training.world import World, processes


@pytest.mark.parametrize("library", examples.PAGES)
def test_no_example_is_long(library):
    assert len(examples.of(library).splitlines()) < 40


@pytest.mark.parametrize("library", [library for library in examples.PAGES if library != "torch"])
def test_the_example_runs(library, tmp_path, monkeypatch):
    pytest.importorskip(library, reason="the extra [adapters] is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(examples.of(library), library, "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_the_script_runs_over_two_ranks(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(examples.of("torch"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert World(processes([sys.executable, "script.py"], 2)).wait() == [0, 0]
    assert (tmp_path / "plain.pt").is_file()


def test_the_table_has_what_passed_alone():
    table = works_with({"test_ddp": 1, "test_wandb": 1}, {"test_wandb"})
    assert f"| DistributedDataParallel, two ranks | torch {version('torch')} | 1 |" in table
    assert "Biases" not in table
