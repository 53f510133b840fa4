"""From words to configs: products, lists, Python files."""

import pytest

from conadv_lab.launch.options import RunOptions
from conadv_lab.launch.sweep import parse_lists, plan, split_lists

FILE = """
from conadv_lab.recipes.digits import vanilla
def grid():
    return [vanilla().replace(global_batch=batch, lr=batch / 1000) for batch in (32, 64)]
def nothing():
    return []
"""


def planned(*words: str):
    return plan("digits-conadv", words, RunOptions())[0]


def test_a_product_of_lists_is_a_run_each_named_by_what_differs():
    runs = planned("--lr", "0.1,0.25", "--seed=0,1", "--epochs", "3")
    assert [run.name for run in runs] == [
        "lr=0.1-seed=0",
        "lr=0.1-seed=1",
        "lr=0.25-seed=0",
        "lr=0.25-seed=1",
    ]
    assert {run.config.training.epochs for run in runs} == {3.0}
    assert [run.config.optimization.lr for run in runs] == [0.1, 0.1, 0.25, 0.25]
    assert len({run.identity for run in runs}) == 4


def test_lists_have_the_fields_types():
    values = parse_lists({"method": ["vanilla", "conadv"], "steps": ["None", "3"], "flip": ["True", "False"]})
    assert values == {"method": ["vanilla", "conadv"], "steps": [None, 3], "flip": [True, False]}


def test_the_commands_own_options_are_no_lists():
    assert split_lists(["--out", "a,b", "--lr", "1,2"], {"out"}) == (["--out", "a,b"], {"lr": ["1", "2"]})


def test_a_python_file_gives_what_is_no_product(tmp_path):
    (tmp_path / "grid.py").write_text(FILE)
    runs, _ = plan(f"{tmp_path}/grid.py:grid", ["--warmup-epochs", "0", "--seed", "0,1"], RunOptions())
    assert [run.name for run in runs] == [
        f"lr={lr}-global_batch={batch}-seed={seed}"
        for batch, lr in ((32, 0.032), (64, 0.064))
        for seed in (0, 1)
    ]
    assert {run.config.optimization.warmup_epochs for run in runs} == {0.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lrr", "0.1,0.2"], "unknown option 'lrr'.*Did you mean 'lr'"),
        (["--lr", "0.1,0.1"], "--lr lists '0.1' twice"),
        (["--lr", "0.1,0.10"], "equals"),
        (["--weights", "0.5,0.5"], "--weights takes several words"),
        (["--lr", "0.1,0.2", "--lr", "0.3,0.4"], "given twice"),
        (["--lr", "0.1,-0.2"], "lr is -0.2; allowed: at least 0"),
        (["--method", "vanilla,conav"], "unknown method 'conav'.*Did you mean 'conadv'"),
    ],
)
def test_mistakes_in_a_sweep_are_told(words, message):
    with pytest.raises(ValueError, match=message):
        planned(*words)


def test_a_file_must_return_configs(tmp_path):
    (tmp_path / "grid.py").write_text(FILE)
    with pytest.raises(ValueError, match="allowed: a function that returns a Config or a list"):
        plan(f"{tmp_path}/grid.py:nothing", [], RunOptions())


def test_long_names_are_cut_and_told_apart(tmp_path):
    long = "x" * 130
    runs = planned("--data-dir", f"{long}1,{long}2")
    assert len({run.name for run in runs}) == 2
    assert all(len(run.name) < 120 for run in runs)
