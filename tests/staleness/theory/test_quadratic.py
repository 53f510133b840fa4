"""The quadratic problem against optimisers, differences, closed forms and a literal rendering."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from conadv_lab.staleness.draws import Draw
from conadv_lab.staleness.theory.quadratic import SOLVERS, Quadratic, example, inner_gap, simulate, solve

PROBLEM = example(size=5, seed=3)


def points(count: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(count, 5))


@pytest.mark.parametrize("theta", points(4, scale=3.0))
def test_the_maximiser_is_what_an_optimiser_finds(theta):
    box = [(-PROBLEM.epsilon, PROBLEM.epsilon)] * 5
    found = minimize(lambda delta: -PROBLEM.gain(theta, delta), np.zeros(5), bounds=box, tol=1e-14)
    assert PROBLEM.maximiser(theta) == pytest.approx(found.x, abs=1e-5)
    assert any(abs(PROBLEM.maximiser(theta)) == 1) or abs(theta).max() < 1.5  # the box is felt


def test_the_gradient_is_that_of_the_objective():
    """Danskin: the maximiser is held while θ is differentiated, inside the box and on its rim."""
    for theta in points(6, scale=2.0):
        for place, direction in enumerate(np.eye(5) * 1e-6):
            rise = PROBLEM.objective(theta + direction) - PROBLEM.objective(theta - direction)
            assert rise / 2e-6 == pytest.approx(PROBLEM.gradient(theta)[place], abs=1e-7)


def test_the_objective_is_nowhere_below_its_bound():
    assert PROBLEM.objective(np.zeros(5)) == 0
    assert (PROBLEM.objective(points(500)) > 0).all()


def test_gaps_hold_everywhere_and_the_sign_step_reaches_its_own():
    thetas = np.concatenate([points(500, scale) for scale in (1e-6, 0.1, 1.0, 10.0)])
    for solver in SOLVERS:
        error = ((solve(PROBLEM, thetas, solver) - PROBLEM.maximiser(thetas)) ** 2).sum(-1)
        gap = inner_gap(PROBLEM, solver)
        assert (error <= gap / PROBLEM.mu + 1e-12).all()
        if solver == "sign":
            assert error.max() > (1 - 1e-4) * gap / PROBLEM.mu
    nothing = (PROBLEM.maximiser(points(500, 10.0)) ** 2).sum(-1)
    assert nothing.max() <= inner_gap(PROBLEM, "sign") / PROBLEM.mu  # no attack at all does as well


def test_ascent_nears_the_maximiser_by_half_a_step():
    theta = points(1, 0.1)
    error = [
        abs(solve(PROBLEM, theta, "ascent", steps=k) - PROBLEM.maximiser(theta)).max() for k in (2, 3, 4)
    ]
    assert error[1] == pytest.approx(error[0] / 2)
    assert error[2] == pytest.approx(error[1] / 2)


def leftovers(problem: Quadratic, start, lr, taus, replicas, solver, seed) -> np.ndarray:
    """What is left of every step, (steps · replicas, n), once the gradient with stored θ is taken out of it."""
    stored: list[np.ndarray] = []
    path = simulate(problem, start, lr, taus, replicas=replicas, solver=solver, seed=seed,
                    watch=lambda t, theta, seen: stored.append(theta.copy()))  # fmt: skip
    stored.append(path.theta)
    found = []
    for replica in range(replicas):
        for t, of_workers in enumerate(taus):
            delta = np.zeros(len(start))
            for tau in of_workers:
                delta += solve(problem, stored[max(0, t - tau)][replica], solver) / len(of_workers)
            gradient = 2 * (problem.a @ stored[t][replica]) + problem.b @ delta
            found.append((stored[t][replica] - stored[t + 1][replica]) / lr - gradient)
    return np.array(found)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_is_the_stale_gradient_and_noise_of_the_stated_variance(solver):
    taus = Draw("geometric", 2.0, workers=3).array(400, seed=1)
    found = leftovers(PROBLEM, points(1)[0], 0.05, taus, 4, solver, seed=2)
    assert (found**2).sum(-1).mean() == pytest.approx(PROBLEM.variance, rel=0.1)
    assert abs(found.mean(0)).max() < 4 * (PROBLEM.variance / 5 / len(found)) ** 0.5


def test_without_noise_a_step_is_the_stale_gradient():
    taus = Draw("poisson", 3.0, workers=2).array(50, seed=1)
    found = leftovers(example(size=5, noise=0.0), points(1)[0], 0.05, taus, 1, "exact", seed=2)
    assert abs(found).max() < 1e-12


def scalar(noise: float = 1.0) -> Quadratic:
    """No clean loss and no box: θ ← θ − η (θ_{t−τ} + noise)."""
    return Quadratic(np.zeros((1, 1)), np.eye(1), epsilon=np.inf, noise=noise, weights=(0.0, 1.0))


def test_without_staleness_the_spread_is_the_closed_form():
    lr, steps = 0.3, 3000
    path = simulate(scalar(), np.zeros(1), lr, np.zeros((steps, 1)), replicas=200)
    assert path.squared_gradients[100:].mean() == pytest.approx(lr / (2 - lr), rel=0.02)


@pytest.mark.parametrize("tau", [1, 4, 16])
def test_the_largest_stable_step_shrinks_with_staleness(tau):
    """θ_{t+1} = θ_t − ηθ_{t−τ} is stable below η = 2 sin(π / (4τ + 2)) (Levin and May 1976)."""
    limit = 2 * math.sin(math.pi / (4 * tau + 2))
    ends = [
        simulate(scalar(0.0), np.ones(1), lr * limit, np.full((4000, 1), tau), replicas=1)
        for lr in (0.95, 1.05)
    ]
    assert ends[0].squared_gradients[-1] < 1e-6
    assert not ends[1].squared_gradients[-1] < 1e6


MISTAKES = {
    "shape of A and B": lambda: Quadratic(np.eye(2), np.eye(3)),
    "without negative eigenvalues": lambda: Quadratic(-np.eye(2), np.eye(2)),
    "mu is 0": lambda: Quadratic(np.eye(2), np.eye(2), mu=0),
    "epsilon is -1": lambda: Quadratic(np.eye(2), np.eye(2), epsilon=-1),
    "noise is nan": lambda: Quadratic(np.eye(2), np.eye(2), noise=math.nan),
    "unknown solver 'exac'.*'exact'": lambda: simulate(PROBLEM, np.zeros(5), 0.1, np.zeros((2, 1)), solver="exac"),
    "shape of the start": lambda: simulate(PROBLEM, np.zeros(4), 0.1, np.zeros((2, 1))),
    "a negative number at step 1": lambda: simulate(PROBLEM, np.zeros(5), 0.1, np.array([[0], [-1]])),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()
