"""AutoWU against a slow rendering of its definition; what ends the growth; resuming bit for bit."""

import io
from math import cos, nan, pi

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import softplus

from conadv_lab.optim.autowu import AutoWU


def loss_at(lr: float, step: int, noise: float = 0.03) -> float:
    """Falls while the rate is useful, and rises once it is above 0.005."""
    wave = noise * torch.sin(torch.tensor(37.0 * step)).item()
    return 2.3 - min(2.0, 400 * lr) + min(5.0, 100 * max(0.0, lr - 0.005)) + wave


def grown(schedule: AutoWU, to: int | None = None, begin: int = 0, loss=loss_at) -> AutoWU:
    """Feed a schedule until its growth ends, or until ``to`` steps are taken."""
    for step in range(begin, schedule.steps if to is None else to):
        if not schedule.growing:
            break
        schedule.note(step, torch.tensor(loss(schedule(step), step), dtype=torch.float64))
        if schedule.due(step + 1):
            schedule.judge(step + 1)
    return schedule


@pytest.fixture(scope="module")
def whole() -> AutoWU:
    return grown(AutoWU(lr=1.0, steps=120, epoch=6, seed=3))


def literal_verdicts(losses: list[float], schedule: AutoWU) -> list[tuple[float, float]]:
    """(probability, learning rate) of each test: dense fits, scikit-learn's posterior, a grid of places in Python."""
    first = torch.tensor(1e-3 - 1e-4, dtype=torch.float64).expm1().log()
    raw = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.0, 0.0, first.item())]
    adam = torch.optim.Adam(raw, lr=0.01)
    verdicts = []
    for count in range(schedule.epoch, len(losses) + 1, schedule.epoch):
        x = torch.tensor([(t + 1) / count for t in range(count)], dtype=torch.float64)
        y = torch.tensor(losses[:count], dtype=torch.float64)
        raw[0].data = y.mean()
        kernel = torch.exp(-((x[:, None] - x) ** 2) / (2 * 0.2**2))
        for _ in range(100):
            adam.zero_grad()
            covariance = softplus(raw[1]) * kernel + (1e-4 + softplus(raw[2])) * torch.eye(count)
            density = MultivariateNormal(raw[0].expand(count), covariance)
            (-density.log_prob(y) / count).backward()
            adam.step()
        c, s, n = raw[0].item(), softplus(raw[1]).item(), 1e-4 + softplus(raw[2]).item()
        peer = GaussianProcessRegressor(ConstantKernel(s) * RBF(0.2), alpha=n, optimizer=None)
        peer.fit(x[:, None].numpy(), y.numpy() - c)
        grid = torch.linspace(1 / count, 1, 500, dtype=torch.float64)
        mean, cov = peer.predict(grid[:, None].numpy(), return_cov=True)
        highest = max(
            Normal(0, 1)
            .cdf(
                torch.tensor((mean[-1] - mean[i]) / (cov[i, i] + cov[-1, -1] - 2 * cov[i, -1] + 1e-4) ** 0.5)
            )
            .item()
            for i in range(500)
        )
        place = grid[int(mean.argmin())].item()
        step = min(range(count), key=lambda t: abs((t + 1) / count - place))
        verdicts.append((highest, 1e-5 * 1e5 ** (step / schedule.longest)))
    return verdicts


def test_equals_the_definition_rendered_slowly(whole):
    schedule = whole
    assert schedule.switch is not None
    losses = [loss_at(1e-5 * 1e5 ** (step / 60), step) for step in range(schedule.switch)]
    expected = literal_verdicts(losses, schedule)
    assert [v.probability for v in schedule.verdicts] == pytest.approx([p for p, _ in expected], abs=1e-6)
    assert [v.lr for v in schedule.verdicts] == pytest.approx([lr for _, lr in expected], rel=1e-9)
    positive = [p > 0.95 for p, _ in expected]
    assert positive[-3:] == [True] * 3
    assert [True] * 3 not in [positive[i : i + 3] for i in range(len(positive) - 3)]
    assert schedule.found == expected[-1][1]
    assert "turned" in schedule.reason


def test_growth_plateau_and_cosine():
    schedule = AutoWU(lr=1.0, steps=100, epoch=5, end=0.001)
    assert [schedule(step) for step in (0, 10, 25)] == pytest.approx([1e-5, 1e-4, 10**-2.5])
    grown(schedule)
    assert schedule.switch is not None
    assert 0.003 < schedule.found < 0.01  # the loss is lowest at 0.005
    assert {schedule(step) for step in range(schedule.switch, 81)} == {schedule.found}
    assert schedule(90) == pytest.approx((schedule.found + 0.001) / 2)
    assert schedule(100) == schedule(200) == pytest.approx(0.001)
    assert schedule(3) == pytest.approx(1e-5 * 10**0.3)  # what was, not what is


def test_cooldown_1_falls_from_the_switch_on():
    schedule = grown(AutoWU(lr=1.0, steps=100, epoch=5, cooldown=1.0))
    assert schedule.switch is not None
    middle = (schedule.switch + 100) / 2
    done = (int(middle) - schedule.switch) / (100 - schedule.switch)
    assert schedule(int(middle)) == pytest.approx(schedule.found * (1 + cos(pi * done)) / 2)


def test_a_loss_that_only_falls_lets_it_grow_for_half_the_run():
    schedule = grown(AutoWU(lr=1.0, steps=60, epoch=7), loss=lambda lr, step: 2.3 - 0.05 * step)
    assert (schedule.switch, schedule.reason) == (30, "half of all steps have been taken")
    assert schedule.found == pytest.approx(schedule(29), rel=1e-6)


@pytest.mark.parametrize("broken", [nan, float("inf")])
def test_a_loss_that_is_not_finite_ends_the_growth_with_those_before_it(broken):
    schedule = AutoWU(lr=1.0, steps=100, epoch=10)
    gradients = [torch.ones(2), torch.full((2,), nan)]
    for step in range(30):
        value = broken if step >= 29 else loss_at(schedule(step), step)
        schedule.note(step, torch.tensor(value), gradients if step == 29 else ())
        if schedule.due(step + 1):
            schedule.judge(step + 1)
    assert schedule.switch == 30
    assert schedule.reason == f"the loss of step 29 is {broken}"
    assert 0.003 < schedule.found < 0.01
    assert all(torch.equal(gradient, torch.zeros(2)) for gradient in gradients)


def test_gradients_of_a_finite_step_stay():
    gradient = torch.tensor([1.0, 2.0])
    AutoWU(lr=1.0, steps=10, epoch=1).note(0, torch.tensor(0.5), [gradient])
    assert gradient.tolist() == [1.0, 2.0]


def test_a_first_loss_that_is_not_finite_leaves_the_first_rate():
    schedule = AutoWU(lr=1.0, steps=10, epoch=1)
    schedule.note(0, torch.tensor(nan))
    schedule.judge(1)
    assert (schedule.switch, schedule.found) == (1, 1e-5)


@pytest.mark.parametrize("stop", [1, 24, 35])
def test_a_state_through_a_file_goes_on_to_the_same_switch(whole, stop):
    file = io.BytesIO()
    torch.save(grown(AutoWU(lr=1.0, steps=120, epoch=6, seed=3), to=stop).state_dict(), file)
    file.seek(0)
    again = AutoWU(lr=1.0, steps=120, epoch=6, seed=3)
    again.load_state_dict(torch.load(file, weights_only=True))
    grown(again, begin=stop)
    assert (again.switch, again.found, again.verdicts) == (whole.switch, whole.found, whole.verdicts)


def test_many_losses_are_drawn_from_by_the_seed_alone():
    """Above 500 losses five predictions take five draws; torch's own generator does not matter."""
    made = []
    for state, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(state)
        made.append(grown(AutoWU(lr=1.0, steps=1200, epoch=550, seed=seed), to=550))
    assert made[0].verdicts == made[1].verdicts
    assert torch.equal(made[0].process.raw, made[1].process.raw)
    assert not torch.equal(made[0].process.raw, made[2].process.raw)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"first": 0.0}, r"first_lr is 0\.0; allowed: a finite number above 0"),
        ({"lr": 1e-6}, r"lr is 1e-06; allowed: a finite number above first_lr, which is 1e-05"),
        ({"cooldown": 1.5}, r"cooldown is 1\.5; allowed: 0 to 1"),
        ({"end": 2.0}, r"end_lr is 2\.0; allowed: 0 to lr, which is 1\.0"),
        ({"epoch": 0}, "epoch is 0; allowed: a whole number of at least 1"),
    ],
)
def test_impossible_settings_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutoWU(**{"lr": 1.0, "steps": 10, "epoch": 1} | arguments)
