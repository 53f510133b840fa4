"""The control trains as the recipe says, finds a wrong judgement, and refuses what it cannot mirror."""

import json
from functools import lru_cache

import pytest
import torch

from benchmarks import control
from benchmarks.accuracy import Options
from conadv_lab.config import Config, Data, resolved
from conadv_lab.data.loader import as_float
from conadv_lab.data.sets import TensorSet
from conadv_lab.recipes import cifar, digits
from conadv_lab.training.build import Parts, build

LEVELS = 4
CLOSE = 4.0
"""Points between two trainings of one recipe that could be chance."""


def levels(count: int, seed: int) -> TensorSet:
    """Noisy grey images, which are told apart by how bright they are: what a wrong scale of activations confuses."""
    labels = torch.arange(count) % LEVELS
    noise = torch.randn(count, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = (0.55 + 0.1 * labels)[:, None, None] + 0.05 * noise
    return TensorSet((255 * images.clamp(0, 1)).to(torch.uint8)[:, None], labels, LEVELS)


@lru_cache
def level_sets() -> tuple[TensorSet, TensorSet]:
    return levels(512, 0), levels(512, 1)


def sets(config: Config) -> tuple[TensorSet, TensorSet]:
    return level_sets()


SMALL = digits.vanilla().replace(
    dataset=f"{__file__}:sets", crop=2, cutout=4, epochs=8, global_batch=64, warmup_epochs=1, base_lr=0.05
)


def compared(config=SMALL, **options):
    rows = {row.name: row.value for row in control.measure("mine", config, Options(**options))}
    seeds = options.get("seeds", 1)
    ours, plain = (
        [rows[f"{side}, test accuracy, seed {i}"] for i in range(seeds)] for side in ("mine", "plain loop")
    )
    return ours, plain, rows


def test_a_recipe_is_as_good_as_a_plain_loop():
    ours, plain, rows = compared(seeds=2)
    assert min(plain) > 90
    assert sum(ours) / 2 >= sum(plain) / 2 - CLOSE
    assert rows["above the plain loop, mean"] == pytest.approx((sum(ours) - sum(plain)) / 2)
    assert rows["mine, test accuracy, standard deviation"] == pytest.approx(abs(ours[0] - ours[1]) / 2**0.5)


def test_statistics_of_images_that_training_never_saw_are_found_out(monkeypatch):
    def plain_images(parts):
        images = as_float(parts.train_set.fetch(torch.arange(len(parts.train_set)))[0])
        return iter(images.split(128))

    monkeypatch.setattr(Parts, "calibration", plain_images)
    ours, plain, _ = compared(seeds=2)
    assert sum(ours) / 2 < sum(plain) / 2 - 2 * CLOSE


def test_a_finished_run_is_taken_as_it_is_and_one_of_another_config_is_refused(tmp_path):
    config = SMALL.replace(epochs=1)
    ours, _, _ = compared(config, out=tmp_path, json=tmp_path / "figures.json")
    result = tmp_path / "mine-s0/result.json"
    before = result.stat().st_mtime_ns
    assert compared(config, out=tmp_path)[0] == ours
    assert result.stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "figures.json").read_text())["rows"]) == 3
    with pytest.raises(ValueError, match="was started with another config: crop is 1, was 2"):
        compared(config.replace(crop=1), out=tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"schedule": "polynomial", "power": 1.5, "end_lr": 0.01},
        {"schedule": "cosine", "end_lr": 0.02, "warmup_epochs": 0},
        {"schedule": "step", "milestone_epochs": (2.0, 3.5), "decay_factor": 0.2},
        {"schedule": "constant", "warmup_steps": 3},
    ],
)
def test_the_learning_rate_is_the_recipes(fields):
    config = resolved(SMALL.replace(**fields))
    parts = build(config)
    lr, steps = config.optimization.lr, parts.stream.steps
    written = control.factor(config, steps, len(parts.train_set))
    assert [lr * written(step) for step in range(steps)] == pytest.approx(
        [parts.schedule(step) for step in range(steps)]
    )


def test_crops_and_flips_are_as_often_as_they_should_be():
    torch.manual_seed(0)
    images = 1.0 + torch.arange(24.0).view(1, 1, 4, 6).expand(4_000, 2, 4, 6)
    shifted = control.augmented(images, Data(crop=1))
    seen = shifted[:, 0, 1:3, 1:5].flatten(1).unique(dim=0, return_counts=True)
    assert len(seen[0]) == 9
    assert all(380 < count < 510 for count in seen[1].tolist())
    assert torch.equal(shifted[:, 0], shifted[:, 1])
    corner = shifted[:, 0, 0, 0].unique().tolist()
    assert corner == [0.0, 1.0, 2.0, 7.0, 8.0]  # black where the frame is
    flipped = control.augmented(images, Data(flip=True))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert 1_850 < int(mirrored.sum()) < 2_150
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_cutout_blanks_a_square_that_may_reach_over_the_edge():
    torch.manual_seed(0)
    blank = control.augmented(torch.ones(500, 1, 6, 6), Data(cutout=3)).eq(0).sum((1, 2, 3))
    assert set(blank.tolist()) == {4, 6, 9}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (digits.conadv(), "method is 'conadv'; allowed beside a plain loop: 'vanilla'"),
        (cifar.resnet18_2k(), "optimizer is 'lars'; allowed beside a plain loop: 'sgd'"),
        (digits.vanilla().replace(micro_batch=64), "micro_batch is 64; allowed beside a plain loop: None"),
        (Config().replace(method="vanilla", dataset="imagenet"), "dataset is 'imagenet'"),
    ],
)
def test_what_it_cannot_mirror_is_refused(config, told):
    with pytest.raises(ValueError, match=told):
        control.measure("mine", config, Options())


def test_the_command_refuses_in_one_sentence(capsys):
    assert control.main(["digits-vanila"]) == 2
    assert control.main(["digits-vanilla", "--seeds", "0"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("Did you mean 'digits-vanilla'?")
    assert told[1:] == ["error: seeds is 0; allowed: a whole number of at least 1"]
