"""The whole of ``measure``: resuming, ranks, memory, and that every measure says what it rests on."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from torch import nn

from conadv_lab.sharpness.measures.front import DEFAULT, measure, names
from conadv_lab.sharpness.measures.results import CONDITIONS, FACTS, Report
from conadv_lab.sharpness.measures.study import REGISTRY
from conadv_lab.sharpness.operators import matrices as operators
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.page import page, write_csv, write_json
from tests.sharpness.conftest import cnn, mlp, ragged_batches

BATCHES = ragged_batches("mlp", torch.float32)
STATED = dict.fromkeys(FACTS, "unknown")


def test_a_report_is_complete_and_survives_json(tmp_path):
    report = measure(
        mlp(nn.ReLU), nn.CrossEntropyLoss(), BATCHES, (*DEFAULT, "density", "adaptive_worst"), facts=STATED, k=2,
        probes=2, steps=8,
    )  # fmt: skip
    report.save(tmp_path / "sharpness.json")
    data = json.loads((tmp_path / "sharpness.json").read_text())
    assert {m["name"] for m in data["measures"]} >= {"top_eigenvalue", "trace", "density", "adaptive_worst"}
    for one in data["measures"]:
        assert set(one) == {"name", "value", "error", "products", "seconds", "conditions"}
        assert not [key for key in CONDITIONS if key not in one["conditions"]]
    assert Report.from_dict(data)["trace"].value == report["trace"].value
    with pytest.raises(ValueError, match="Did you mean 'trace'"):
        report["trase"]


def test_a_number_without_its_conditions_is_not_written(tmp_path):
    report = measure(mlp(), nn.CrossEntropyLoss(), BATCHES, ("input_sharpness",), facts=STATED)
    data = report.to_dict()
    del data["measures"][0]["conditions"]["bn"]
    with pytest.raises(ValueError, match="lacks bn"):
        Report.from_dict(data).save(tmp_path / "sharpness.json")
    assert not (tmp_path / "sharpness.json").exists()


WRITERS = {
    "save": lambda report, path: report.save(path),
    "json": lambda report, path: write_json([("net", report)], path),
    "csv": lambda report, path: write_csv([("net", report)], path),
    "html": lambda report, path: path.write_text(page([("net", report)])),
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_facts_that_nobody_stated_are_none_and_are_not_written(tmp_path, kind):
    report = measure(
        mlp(), lambda f, y: nn.functional.cross_entropy(f, y), BATCHES, ("input_sharpness",),
        facts={"split": "train", "augmentation": "none", "learning_rate": 0.1},
    )  # fmt: skip
    assert report.conditions["weight_decay_inside"] is None
    with pytest.raises(
        ValueError,
        match=r"lacks metadata that cannot be inferred: weight_decay_inside, label_smoothing; .* 'unknown'",
    ):
        WRITERS[kind](report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_second_call_goes_on_from_the_folder(tmp_path, monkeypatch):
    wanted = ("top_eigenvalue", "frobenius_norm", "density")
    options = {"measures": wanted, "k": 2, "steps": 8, "probes": 2, "deflate": 10}
    whole = measure(mlp(), nn.CrossEntropyLoss(), BATCHES, **options)

    def stop(study):
        raise KeyboardInterrupt

    monkeypatch.setitem(REGISTRY, "frobenius_norm", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(mlp(), nn.CrossEntropyLoss(), BATCHES, resume=tmp_path, **options)
    monkeypatch.undo()
    again = measure(mlp(), nn.CrossEntropyLoss(), BATCHES, resume=tmp_path, **options)
    assert [m.value for m in again.measures] == [m.value for m in whole.measures]
    monkeypatch.setattr(operators.Operator, "__matmul__", stop)
    third = measure(mlp(), nn.CrossEntropyLoss(), BATCHES, resume=tmp_path, **options)
    assert third.measures == again.measures
    with pytest.raises(ValueError, match="belongs to another measurement"):
        measure(mlp(), nn.CrossEntropyLoss(), BATCHES, resume=tmp_path, seed=1, **options)


def test_every_measure_is_documented():
    for name in names():
        assert len(REGISTRY[name].__doc__ or "") > 60, name


RANK = """
import sys, torch
from torch import nn, distributed
from conadv_lab.sharpness import measure
from conadv_lab.sharpness.measures.results import FACTS
from tests.sharpness.conftest import cnn, ragged_batches
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
batches = ragged_batches("cnn", torch.float64)
wanted = ("top_eigenvalues", "trace", "sam_worst", "input_sharpness", "fisher_rao", "m_sharpness",
          "batch_sharpness", "density", "landscape_line", "adaptive_average", "layer_traces")
options = {"all_reduce": True, "ascent_steps": 2, "steps": 6, "probes": 2}
facts = dict.fromkeys(FACTS, "unknown")
report = measure(cnn().double(), nn.CrossEntropyLoss(), batches[rank::2], wanted, facts=facts, **options)
if rank == 0:
    report.save(sys.argv[3])
distributed.destroy_process_group()
"""


def approximately(value):
    """A nest of numbers to 1e-5."""
    if isinstance(value, dict):
        return {key: approximately(part) for key, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [approximately(part) for part in value]
    return pytest.approx(value, rel=1e-5, abs=1e-9)


@pytest.mark.slow
def test_two_ranks_give_the_result_of_one(tmp_path):
    meeting, out = tmp_path / "meeting", tmp_path / "out.json"
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(meeting), str(out)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = Report.from_dict(json.loads(out.read_text()))
    wanted = [m.name for m in found.measures]
    alone = measure(
        cnn().double(),
        nn.CrossEntropyLoss(),
        ragged_batches("cnn"),
        wanted,
        ascent_steps=2,
        steps=6,
        probes=2,
    )
    for name in wanted:
        assert found[name].value == approximately(alone[name].value), name
        if name in ("m_sharpness", "batch_sharpness"):
            assert found[name].error == pytest.approx(alone[name].error, rel=1e-5)
    assert found.conditions["examples"] == 21


@pytest.mark.slow
def test_a_hundred_calls_do_not_grow():
    batches = [(torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,)))]
    model, process = cnn(), psutil.Process()

    def call():
        problem = Problem(model, nn.CrossEntropyLoss(), batches)
        operators.GGN(problem) @ (operators.Hessian(problem) @ torch.ones(problem.size))

    for _ in range(10):
        call()
    before = process.memory_info().rss
    for _ in range(100):
        call()
    assert process.memory_info().rss < 1.05 * before


def test_a_streamed_product_holds_one_batch_of_graph():
    alive = []

    class Counting(operators.Hessian):
        def _prepare(self, leaves, run, targets):
            rule = super()._prepare(leaves, run, targets)
            alive.append(__import__("weakref").ref(rule))
            assert sum(ref() is not None for ref in alive) <= 2  # the one before may await its release
            return rule

    batches = [(torch.randn(4, 1, 8, 8), torch.randint(0, 5, (4,))) for _ in range(12)]
    problem = Problem(cnn(), nn.CrossEntropyLoss(), batches)
    Counting(problem, memory_budget=0) @ torch.ones(problem.size)
    assert len(alive) == 12
