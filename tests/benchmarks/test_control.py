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
from conadv_lab.models.build import build_model
from conadv_lab.models.norm import plain_batch_norm
from conadv_lab.optim.groups import parameter_groups
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


NEVER = torch.zeros(1, dtype=torch.bool)


def test_every_crop_is_as_likely_and_its_frame_is_black_or_a_reflection():
    torch.manual_seed(0)
    images = 1.0 + torch.arange(24.0).view(1, 1, 4, 6).expand(4_000, 2, 4, 6)
    for padding, corners in (("zeros", {0, 1, 2, 7, 8}), ("reflect", {1, 2, 7, 8})):
        shifted = control.augmented(images, Data(crop=1, crop_padding=padding), NEVER)
        seen, counts = shifted[:, 0, 1:3, 1:5].flatten(1).unique(dim=0, return_counts=True)
        assert len(seen) == 9
        assert all(380 < count < 510 for count in counts.tolist())
        assert torch.equal(shifted[:, 0], shifted[:, 1])
        assert set(shifted[:, 0, 0, 0].tolist()) == corners


def test_images_are_mirrored_where_it_says_so():
    images = torch.rand(10, 2, 4, 6)
    mirrored = torch.arange(10) % 3 == 0
    flipped = control.augmented(images, Data(flip=True), mirrored)
    assert torch.equal(flipped[mirrored], images[mirrored].flip(3))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert torch.equal(control.augmented(images, Data(), mirrored), images)


def test_cutout_blanks_a_square_that_may_reach_over_the_edge():
    torch.manual_seed(0)
    blank = control.augmented(torch.ones(500, 1, 6, 6), Data(cutout=3), NEVER).eq(0).sum((1, 2, 3))
    assert set(blank.tolist()) == {4, 6, 9}


def test_a_pass_has_each_image_once():
    order = control.shuffled(10, 3, torch.device("cpu"))
    for epoch in range(2):
        batches = [next(order) for _ in range(3)]
        assert {number for number, _ in batches} == {epoch}
        assert len(torch.cat([chosen for _, chosen in batches]).unique()) == 9


@pytest.mark.parametrize("recipe", [digits.vanilla, cifar.fast, cifar.resnet18_512, cifar.resnet20_cpu])
def test_every_parameter_has_the_recipes_rate_and_decay(recipe):
    config = resolved(recipe())
    model = plain_batch_norm(build_model(config.model, 10, config.training.seed))
    section = config.optimization
    groups = parameter_groups(model, section.weight_decay, section.bias_lr_factor)
    wanted = {
        id(p): (section.lr * group.get("lr_factor", 1.0), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    optimizer = control.sgd(model, section)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == wanted
    control.require_plain(config)


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
