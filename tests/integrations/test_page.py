"""The page's examples run with the real libraries, each under 40 lines, and its table is of what ran."""

import sys
from importlib.metadata import version

import pytest

from tests.docs.pages import ROOT, Page
from tests.integrations.conftest import works_with
from tests.training.world import World, processes

PAGE = Page("docs/integrations.md", (ROOT / "docs/integrations.md").read_text(encoding="utf-8"))
EXAMPLES = [code for _, code in PAGE.fences("python")]
NEEDED = {
    "lightning": "import lightning",
    "transformers": "from transformers",
    "accelerate": "from accelerate",
}


def test_there_is_an_example_for_each_and_none_is_long():
    assert len(EXAMPLES) == 4
    assert all(len(code.splitlines()) < 40 for code in EXAMPLES)


@pytest.mark.parametrize("library", NEEDED)
def test_the_example_runs(library, tmp_path, monkeypatch):
    pytest.importorskip(library, reason="the extra [adapters] is not installed")
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in EXAMPLES if NEEDED[library] in code]
    exec(compile(code, library, "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_the_script_runs_over_two_ranks(tmp_path, monkeypatch):
    (code,) = [code for code in EXAMPLES if "init_process_group" in code]
    (tmp_path / "script.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert World(processes([sys.executable, "script.py"], 2)).wait() == [0, 0]
    assert (tmp_path / "plain.pt").is_file()


def test_the_table_has_what_passed_alone():
    table = works_with({"test_ddp": 1, "test_wandb": 1}, {"test_wandb"})
    assert f"| DistributedDataParallel, two ranks | torch {version('torch')} | 1 |" in table
    assert "Biases" not in table
