"""The arms are what they claim to be, and tuning never sees the test set."""

from collections import Counter

import pandas as pd
import pytest
import torch

from analysis import arms, folds
from analysis.arms import ATTACK_COST, SCALES, Cell, best_rates, cells
from conadv_lab.config import resolved
from conadv_lab.data.digits import load_digits
from conadv_lab.methods import METHODS
from conadv_lab.training.build import build

FULL = SCALES["full"]


def built(cell: Cell):
    return build(resolved(cell.config(0.1, 0)))


def test_conadv_and_its_controls_are_in_the_full_scale_at_every_batch():
    for batch in FULL.batches:
        there = {c.method for c in cells(FULL) if c.global_batch == batch and c.arm.startswith("equal-")}
        assert there == {*arms.PAIRED, *arms.EQUAL_COST} <= set(METHODS)


def test_ten_seeds_where_the_claims_are():
    for cell in cells(FULL):
        claimed = cell.arm == "equal-depth" or cell.global_batch == 898
        assert len(FULL.seeds_of(cell)) == (10 if claimed else 3)


def test_equal_epochs_see_equally_many_clean_images():
    for batch in FULL.batches:
        own = [built(c) for c in cells(FULL) if (c.arm, c.global_batch) == ("equal-epochs", batch)]
        seen = {parts.stream.first_place(parts.stream.steps) for parts in own}
        assert len(own) == 6
        assert len(seen) == 1
        assert seen.pop() == pytest.approx(16 * 898, rel=0.02)


def test_equal_steps_cost_what_vanilla_costs():
    own = [built(c) for c in cells(FULL) if (c.arm, c.global_batch) == ("equal-steps", 898)]
    assert {parts.stream.steps for parts in own} == {16}
    assert {parts.method.gradient_evaluations for parts in own} == {1.0}
    assert {parts.method.depth for parts in own} == {1}


def test_equal_arithmetic_pays_for_the_attack():
    (vanilla,) = (built(c) for c in cells(FULL) if c.arm == "equal-arithmetic")
    conadv = built(Cell("equal-epochs", "conadv", 898, 16))
    spent = [parts.stream.steps * parts.method.gradient_evaluations for parts in (vanilla, conadv)]
    assert spent[0] == pytest.approx(spent[1], rel=0.02)


def test_equal_depth_gives_the_attacks_devices_to_the_batch():
    own = [c for c in cells(FULL) if c.arm == "equal-depth"]
    third, wide = min(c.global_batch for c in own), max(c.global_batch for c in own)
    assert len({c.steps for c in own}) == 1
    assert wide / third == pytest.approx(ATTACK_COST)
    assert round(ATTACK_COST * (third + 1)) > 898 >= wide
    assert [c.method for c in own if c.global_batch == wide] == ["vanilla"]


def test_equal_updates_take_the_same_steps_at_every_batch():
    own = [c for c in cells(FULL) if c.arm == "equal-updates"]
    assert {c.steps for c in own} == {56}
    assert len(Counter(c.global_batch for c in own)) == 3


def test_every_cell_has_the_same_tuning_budget_and_no_reported_seed():
    trials = [
        (cell, cell.tuning(lr, seed))
        for cell in cells(FULL)
        for lr in FULL.rates
        for seed in FULL.tuning_seeds
    ]
    assert set(Counter(cell for cell, _ in trials).values()) == {15}
    assert not set(FULL.tuning_seeds) & set(range(FULL.seeds))
    assert {config.data.dataset for _, config in trials} == {folds.DIGITS}
    assert len({seed % folds.FOLDS for seed in FULL.tuning_seeds}) == len(FULL.tuning_seeds)


@pytest.mark.parametrize("method", ["vanilla", "recycled-equal"])
def test_tuning_runs_can_be_built_and_take_as_many_steps(method):
    cell = Cell("equal-steps", method, 898, 16)
    parts = build(resolved(cell.tuning(0.1, 100)))
    assert parts.stream.steps == 16
    assert len(parts.train_set) + len(parts.test_set) == 898


def test_folds_part_the_training_images_and_leave_the_test_images_alone():
    def rows(images):
        return Counter(image.numpy().tobytes() for image in images)

    images, _, test_images, _ = load_digits()
    judged: Counter = Counter()
    for seed in range(100, 105):
        train, validation = folds.digits(Cell("", "vanilla", 64, 1).tuning(0.1, seed))
        assert rows(train.images) + rows(validation.images) == rows(images)
        judged += rows(validation.images)
    assert judged == rows(images)
    assert len(test_images) == 899
    assert torch.equal(folds.digits(Cell("", "vanilla", 64, 1).tuning(0.1, 100))[0].labels,
                       folds.digits(Cell("", "copy", 64, 1).tuning(0.4, 105))[0].labels)  # fmt: skip


def test_the_best_rate_wins_and_of_equals_the_lower_loss():
    head = ["arm", "method", "global_batch", "steps", "lr", "validation_accuracy", "validation_loss"]
    rows = [("a", "vanilla", 8, 1, lr, accuracy, loss) for lr, accuracy, loss in
            ((0.1, 98.0, 0.1), (0.2, 99.0, 0.3), (0.4, 99.0, 0.2), (0.8, 90.0, 0.05))]  # fmt: skip
    assert best_rates(pd.DataFrame(rows, columns=head)) == {Cell("a", "vanilla", 8, 1): 0.4}


def test_sweeps_for_a_cluster_hold_each_config_once():
    tuning = arms.tuning()
    assert len(set(tuning)) == len(tuning)
    from analysis import cifar, critical_batch, epsilon

    for made in (cifar.tuning(), critical_batch.sweep(), epsilon.sweep()):
        assert len({resolved(config) for config in made}) == len(made) > 10
