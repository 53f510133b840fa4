"""A recipe's accuracy and seconds beside a peer's: tiny runs, known outcomes, and a peer of the right interface."""

import json
import sys
from types import ModuleType

import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import Outcome, rows_of
from benchmarks.gpu_tests import Counts, files
from conadv_lab.data.cifar import load_cifar
from tests.benchmarks.small_cifar import write_small_cifar


def outcomes(*figures):
    return [Outcome(seed, {"test accuracy": a}, b, c) for seed, (a, b, c) in enumerate(figures)]


def test_rows_have_each_seed_the_mean_and_seconds_beside_the_peers():
    sides = {
        "mine": outcomes((90.0, 9.0, 12.0), (92.0, 6.0, 8.0), (91.0, 6.0, 8.0)),
        "theirs": outcomes((89.0, 9.0, 12.0), (89.0, 3.0, 4.0), (92.0, 3.0, 4.0)),
    }
    rows = {row.name: row for row in rows_of(sides)}
    assert rows["mine, test accuracy, mean of 3"].value == pytest.approx(91.0)
    assert rows["mine, test accuracy, standard deviation"].value == pytest.approx(1.0)
    assert rows["theirs, test accuracy, seed 2"].value == 92.0
    assert (rows["mine, training, median"].ratio, rows["mine, training, median"].peer) == (2.0, "theirs")
    assert rows["mine, whole, seed 0"].value == 12.0
    assert rows["theirs, whole, median"].ratio is None
    assert all(row.ratio is None for row in rows_of({"mine": sides["mine"]}))


def test_without_the_peer_the_recipe_is_measured_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "airbench", None)
    words = "digits-vanilla --epochs 1 --warmup-epochs 0 --seeds 2 --seed 3 --beside airbench94"
    file = tmp_path / "figures.json"
    assert accuracy.main([*words.split(), "--out", str(tmp_path / "runs"), "--json", str(file)]) == 0
    assert "airbench94 is not measured" in capsys.readouterr().err
    rows = {row["name"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    for seed in (3, 4):
        result = json.loads((tmp_path / f"runs/digits-vanilla-s{seed}/result.json").read_text())
        assert rows[f"digits-vanilla, test accuracy, seed {seed}"] == result["test_accuracy"]
        assert (
            0 < rows[f"digits-vanilla, training, seed {seed}"] < rows[f"digits-vanilla, whole, seed {seed}"]
        )


def test_airbench_is_given_the_same_images_in_its_own_layout(tmp_path, monkeypatch):
    seen = {}

    class CifarLoader:
        """As airbench 0.1.8 has it, as far as the files go."""

        def __init__(self, path, train=True, batch_size=500, aug=None, altflip=False):
            data = torch.load(f"{path}/{'train' if train else 'test'}.pt")
            seen[train] = data["images"], data["labels"]
            seen["settings"] = aug, altflip

    package, library = ModuleType("airbench"), ModuleType("airbench.lib_airbench94")
    library.hyp = {"opt": {"batch_size": 1024}, "aug": {"flip": True}}
    package.CifarLoader = CifarLoader
    package.train94 = lambda loader, run, verbose: (run, verbose)
    package.evaluate = lambda network, loader, tta_level: 0.9 + 0.01 * tta_level
    monkeypatch.setitem(sys.modules, "airbench", package)
    monkeypatch.setitem(sys.modules, "airbench.lib_airbench94", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    data = write_small_cifar(tmp_path)
    found = accuracy.airbench94(data)(0)
    assert found.accuracies == {
        "test accuracy": 90.0,
        "test accuracy with test-time augmentation": pytest.approx(92.0),
    }
    images, labels, test_images, test_labels = load_cifar(data)
    for train, pixels, classes in ((True, images, labels), (False, test_images, test_labels)):
        assert seen[train][0].dtype == torch.uint8
        assert torch.equal(seen[train][0], pixels.permute(0, 2, 3, 1))
        assert torch.equal(seen[train][1], classes)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("digits-vanila", "unknown recipe 'digits-vanila'"),
        ("digits-vanilla --beside airbench93", "unknown peer 'airbench93'; allowed: airbench94"),
        ("digits-vanilla --seeds 0", "seeds is 0; allowed"),
        ("cifar10-resnet20-cpu --data-dir EMPTY", "no cifar10 in EMPTY"),
    ],
)
def test_a_mistake_is_one_sentence(words, told, capsys, tmp_path):
    place = str(tmp_path / "empty")
    assert accuracy.main(words.replace("EMPTY", place).split()) == 2
    errors = capsys.readouterr().err
    assert told.replace("EMPTY", place) in errors
    assert errors.count("\n") == 1


class Report:
    def __init__(self, when, outcome, nodeid="tests/a.py::b", failed=False):
        self.when, self.outcome, self.nodeid, self.failed = when, outcome, nodeid, failed


def test_outcomes_of_tests_are_counted_once_and_kept_as_they_come(tmp_path):
    file = tmp_path / "figures.json"
    counts = Counts(file)
    for when in ("setup", "call", "teardown"):
        counts.pytest_runtest_logreport(Report(when, "passed"))
    assert json.loads(file.read_text())["rows"][0] == {
        "name": "passed", "value": 1, "unit": "tests", "peer": None, "ratio": None,
    }  # fmt: skip
    counts.pytest_runtest_logreport(Report("setup", "skipped"))
    counts.pytest_runtest_logreport(Report("call", "failed", "tests/a.py::c"))
    counts.pytest_collectreport(Report("collect", "failed", "tests/d.py", failed=True))
    assert counts.outcomes == {"passed": 1, "skipped": 1, "failed": 2}
    assert [row.name for row in counts.rows()][3:] == ["failed: tests/a.py::c", "failed: tests/d.py"]


def test_files_with_tests_for_a_gpu_are_found():
    names = {path.name for path in files()}
    assert {"test_on_cuda.py", "test_lars.py"} <= names
    assert "test_digits.py" not in names
