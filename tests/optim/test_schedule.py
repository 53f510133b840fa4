"""Schedules as pure functions of the step, and the rules that scale a learning rate with the batch."""

from math import cos, pi

import pytest

from conadv_lab.optim.schedule import Schedule, scaled_lr


@pytest.mark.parametrize("decay", ["constant", "cosine", "polynomial", "step"])
def test_warmup_is_linear_and_reaches_the_peak(decay):
    schedule = Schedule(lr=2.0, steps=10, warmup=4, decay=decay, milestones=(7,))
    assert [schedule(step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("step", [4, 5, 17, 63, 99])
def test_decays_follow_their_formulas(step):
    x = (step - 4) / 96
    settings = {"lr": 3.0, "steps": 100, "warmup": 4, "end": 0.25}
    assert Schedule(decay="cosine", **settings)(step) == pytest.approx(0.25 + 2.75 * (1 + cos(pi * x)) / 2)
    polynomial = Schedule(decay="polynomial", power=1.5, **settings)
    assert polynomial(step) == pytest.approx(0.25 + 2.75 * (1 - x) ** 1.5)
    assert Schedule(decay="constant", **settings)(step) == 3.0


def test_step_decay_counts_from_the_start_of_the_run():
    schedule = Schedule(lr=1.0, steps=10, warmup=2, decay="step", milestones=(4, 6), factor=0.5)
    assert [schedule(step) for step in (3, 4, 5, 6, 50)] == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_last_value_holds_after_the_run():
    for decay in ("cosine", "polynomial"):
        schedule = Schedule(lr=1.0, steps=10, decay=decay, end=0.125)
        assert schedule(9) > 0.125
        assert schedule(10) == schedule(1000) == 0.125


def test_without_warmup_the_run_starts_at_the_peak():
    assert Schedule(lr=1.5, steps=3)(0) == 1.5


def test_warmup_may_fill_the_run_but_not_outlast_it():
    assert Schedule(lr=1.0, steps=4, warmup=4)(3) == 1.0
    with pytest.raises(ValueError, match=r"^warmup is 5; allowed: 0 to 4 steps, the length of the run$"):
        Schedule(lr=1.0, steps=4, warmup=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"steps": 0}, "steps is 0; allowed: a whole number of at least 1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"decay": "cosin"}, "unknown decay 'cosin'.*Did you mean 'cosine'"),
        ({"end": 2.0}, "end is 2.0; allowed: 0 to lr, which is 1.0"),
        ({"power": 0.0}, "power is 0.0"),
        ({"milestones": (5, 3)}, r"milestones is \(5, 3\); allowed: steps in increasing order"),
        ({"factor": 1.5}, "factor is 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"lr": 1.0, "steps": 10, **settings})


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step is -1"):
        Schedule(lr=1.0, steps=10)(-1)


def test_rules_scale_with_the_batch():
    assert scaled_lr(0.1, 8192, 256) == pytest.approx(3.2)
    assert scaled_lr(0.1, 1024, 256, "sqrt") == pytest.approx(0.2)
    assert scaled_lr(0.1, 1024, 256, "none") == 0.1
    assert scaled_lr(0.1, 64, 256) == pytest.approx(0.025)


def test_impossible_scaling_is_refused():
    with pytest.raises(ValueError, match=r"unknown scaling rule 'squrt'.*Did you mean 'sqrt'"):
        scaled_lr(0.1, 2, 1, "squrt")
    with pytest.raises(ValueError, match=r"^batch is 0"):
        scaled_lr(0.1, 0, 256)
    with pytest.raises(ValueError, match="base_batch is 0"):
        scaled_lr(0.1, 256, 0)
