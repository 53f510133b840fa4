"""The part of CIFAR-10: tuned beside the images that are trained on, each cell by its own best rate."""

from collections import Counter

import pytest
import torch

from analysis import cifar_subset, folds
from analysis.cifar_subset import SCALES, cells, config_of, measure, tuning_of
from analysis.study import Options
from conadv_lab.config import demand_of, resolved
from conadv_lab.data import cifar as archive
from conadv_lab.data.sets import load_sets
from conadv_lab.training.build import build

FULL = SCALES["full"]


@pytest.fixture(autouse=True)
def _made_images(monkeypatch):
    """10,000 training and 100 test images of 16 x 16 pixels, no two alike."""
    images = torch.randint(256, (10_100, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    labels = torch.arange(10_100) % 10
    parts = images[:10_000], labels[:10_000], images[10_000:], labels[10_000:]
    monkeypatch.setattr(archive, "load_cifar", lambda *_, **__: parts)


def keys(part):
    return Counter(image.numpy().tobytes() for image in part.images)


def sets(config):
    config = resolved(config)
    return load_sets(config.data, demand_of(config), torch.device("cpu"), config)


def test_rates_are_chosen_on_images_that_no_run_trains_on():
    cell = cells(FULL)[0]
    train, test = sets(config_of(cell, FULL, 1.0, 0, "data"))
    same, validation = sets(tuning_of(cell, FULL, 1.0, "data"))
    assert len(train) == FULL.images
    assert keys(train) == keys(same)
    assert len(validation) == folds.BESIDE
    assert not keys(train) & keys(validation)
    assert not keys(test) & keys(validation)


def test_what_is_equal_in_each_arm():
    for batch in FULL.batches:
        own = {
            (cell.arm, cell.method): build(resolved(config_of(cell, FULL, 1.0, 0, "data")))
            for cell in cells(FULL)
            if cell.global_batch == batch
        }
        spent = {name: parts.stream.steps * parts.method.gradient_evaluations for name, parts in own.items()}
        vanilla = spent["equal-epochs", "vanilla"]
        assert {spent[name] for name in own if name[0] == "equal-steps"} == {vanilla}
        assert spent["equal-arithmetic", "vanilla"] == pytest.approx(
            spent["equal-epochs", "conadv"], rel=0.01
        )


def test_each_cell_is_reported_at_its_own_best_rate(tmp_path, monkeypatch):
    best = {"vanilla": 1.0, "conadv": 2.0, "recycled-equal": 0.5, "copy-equal": 1.0}
    asked = []

    def tune(config, path):
        path.mkdir(parents=True)
        rate = 1.5 * (config.training.global_batch / 512) ** 0.5
        near = -abs(config.optimization.lr / rate - best[config.method.method])
        return {"test_accuracy": near, "seconds": 1.0}

    def report(config, path):
        path.mkdir(parents=True)
        asked.append(config)
        return {**dict.fromkeys(cifar_subset.COLUMNS, 1.0), "seconds": 1.0}

    monkeypatch.setattr(cifar_subset, "trained", tune)
    monkeypatch.setattr(cifar_subset, "measured_without_trace", report)
    monkeypatch.setattr(cifar_subset, "commits_of", lambda *_: "none")
    rows, facts = measure(Options("full", tmp_path, tmp_path, tmp_path / "runs", 1, False, False, "data"))
    assert set(zip(rows["method"], rows["factor"], strict=True)) == set(best.items())
    assert set(rows["seed"]) == {0, 1, 2}
    assert cifar_subset.TUNING_SEED not in set(rows["seed"])
    assert {config.data.dataset for config in asked} == {"cifar10"}
    distinct = len(cells(FULL)) - len(FULL.batches)  # vanilla stands in two arms
    assert facts["runs"] == distinct * (len(FULL.factors) + 3)
