"""A command that says how far it is, shows results as they come, and keeps them when it is interrupted."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from conadv_lab.sharpness import measure
from conadv_lab.sharpness.__main__ import main
from conadv_lab.sharpness.measures import progress
from conadv_lab.sharpness.measures.front import DEFAULT, names
from conadv_lab.sharpness.measures.progress import PRICES, Progress
from conadv_lab.sharpness.measures.results import FACTS
from conadv_lab.sharpness.measures.study import REGISTRY, Study
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.exact import exact_trace
from tests.sharpness.conftest import QUICK, fitted, mlp, ragged_batches

THREE = ["--measures", "trace,sam_average,adaptive_average"]


def test_the_first_line_comes_before_torch_is_imported(stranger):
    code = (
        "import sys; from conadv_lab.sharpness.__main__ import main\n"
        "class Watch:\n"
        "    def write(self, text): assert 'torch' not in sys.modules, text; self.write = lambda text: None\n"
        "    def flush(self): pass\n"
        f"sys.stderr = Watch(); main([{stranger!r}, '--measures', 'batch_sharpness'])\n"
        "assert 'write' in vars(sys.stderr)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_line_a_measure_and_results_as_they_come(stranger, capsys):
    assert main([stranger, *THREE]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"reading {stranger} …"
    for place, name in enumerate(("trace", "sam_average", "adaptive_average"), 1):
        assert said.err.splitlines()[place].startswith(f"{name} ({place} of 3); about ")
    order: list[str] = []
    measure(mlp(), nn.CrossEntropyLoss(), ragged_batches("mlp", torch.float32), ("top_eigenvalue", "trace"),
            shown=lambda one: order.append(one.name))  # fmt: skip
    assert order == ["trace", "top_eigenvalue"]  # the longer answers first


def test_an_interrupted_command_writes_what_is_done_and_goes_on(stranger, tmp_path, monkeypatch, capsys):
    def interrupted(study: Study) -> None:
        raise KeyboardInterrupt

    out, kept = tmp_path / "out.json", tmp_path / "kept"
    words = [stranger, *THREE, "--json", str(out), *(f"--fact={name}=unknown" for name in FACTS)]
    with monkeypatch.context() as patch:
        patch.setitem(REGISTRY, "adaptive_average", interrupted)
        assert main(words) == 130
        told = capsys.readouterr()
        assert "with --resume DIR it could continue" in told.err
        assert told.out.splitlines()[1].split()[0] == "trace"
        assert [m["name"] for m in json.loads(out.read_text())["measures"]] == ["trace", "sam_average"]
        assert main([*words, "--resume", str(kept)]) == 130
    monkeypatch.setitem(REGISTRY, "sam_average", interrupted)  # it is not made again
    assert main([*words, "--resume", str(kept)]) == 0
    assert len(json.loads(out.read_text())["measures"]) == 3


def test_interrupted_before_the_first_measure_nothing_is_written(stranger, tmp_path, monkeypatch):
    def interrupted(study: Study) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(REGISTRY, "trace", interrupted)
    facts = [f"--fact={name}=unknown" for name in FACTS]
    assert main([stranger, *THREE, "--json", str(tmp_path / "out.json"), *facts]) == 130
    assert not (tmp_path / "out.json").exists()


def test_all_measures_that_have_a_meaning(stranger, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = [f"--set={name}={value!r}" for name, value in QUICK.items()]
    assert main([stranger, "--all", "--json", str(out), *words, *(f"--fact={n}=unknown" for n in FACTS)]) == 0
    found = {m["name"] for m in json.loads(out.read_text())["measures"]}
    refused = set(names()) - found
    assert {"lr_lambda_max", "fgsm_accuracy", "pgd_accuracy"} <= refused
    assert {"density", "sam_worst", "landscape_eigen", "keskar"} <= found
    err = capsys.readouterr().err
    assert "left out: lr_lambda_max, as lr_lambda_max has learning_rate 'unknown'; allowed: a number" in err
    assert main([stranger, "--all", "--also", "trace"]) == 2


def test_the_default_set_is_the_cheap_one():
    assert set(PRICES) <= set(names())
    assert sum(PRICES.get(name, 2) for name in DEFAULT) <= 65
    assert max(PRICES.get(name, 2) for name in DEFAULT) <= 28


def test_the_time_left(monkeypatch, capsys):
    """From the first gradient, then from what the measures took; what was kept says nothing of the others."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = Progress(["trace", "trace", "density", "trace"], 0.1, shown=True)
    told.begin()
    assert told.left() == pytest.approx(0.1 * (3 * 27 + 105))
    told.end()  # at once, as from a journal
    told.begin()
    now[0] += 27 * 0.3 + 0.2
    told.end()  # so a gradient takes 0.3
    told.begin()
    assert told.left() == pytest.approx(0.3 * (105 + 27), rel=0.01)
    now[0] += 10
    assert told.left() == pytest.approx(0.3 * (105 + 27) - 10, rel=0.01)
    now[0] += 1000  # longer than thought: at least the others are left
    assert told.left() == pytest.approx(0.3 * 27, rel=0.01)
    assert "density (3 of 4); about 40 s left" in capsys.readouterr().err


def test_a_long_measure_is_told_again(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with Progress(["density"], 0.1, shown=True) as told:
        told.begin()
        told.product()
        told.over.wait(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert lines[-1].startswith("density (1 of 1), 1 products; about ")
    assert not told.ticker.is_alive()


def test_two_eigenvectors_are_enough_for_a_plane():
    """Where more were asked for by another measure."""
    model, batches = fitted()
    wanted = ("top_eigenvalues", "landscape_eigen")
    report = measure(model, nn.CrossEntropyLoss(), batches, wanted, **QUICK | {"k": 3})
    assert len(report["landscape_eigen"].value["axes"]) == 2


def test_one_exact_trace_serves_both_matrices():
    model, batches = fitted()
    report = measure(model, nn.CrossEntropyLoss(), batches, ("trace", "ggn_trace"))
    alone = exact_trace(Problem(model, nn.CrossEntropyLoss(), batches), matrix="ggn")
    assert report["ggn_trace"].value == report["trace"].value == alone.value
