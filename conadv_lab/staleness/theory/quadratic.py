"""A min–max problem with known constants, and training on it with stale maximisers.

docs/theory.md derives the bound that `theory` evaluates on it. Arrays have shape (replicas, …): many independent runs
in parallel estimate an expectation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conadv_lab.mistakes import require, unknown
from conadv_lab.seeds import derived_seed
from conadv_lab.staleness.draws import Taus, checked

Array = NDArray[np.float64]
SOLVERS = ("exact", "ascent", "sign")
Watch = Callable[[int, Array, list[Array]], None]


@dataclass(frozen=True)
class Quadratic:
    """min over θ of F(θ) = E[w₁ ℓ(θ, 0; ξ) + w₂ max over ‖δ‖∞ ≤ ε of ℓ(θ, δ; ξ)], where

        ℓ(θ, δ; ξ) = ½ θᵀAθ + θᵀ(ξ + Bδ) − (μ/2) ‖δ‖²,   ξ normal with mean 0 and variance s² in each of n components.

    ξ plays the clean image and δ its perturbation. The maximiser is δ*(θ) = clip(Bᵀθ / μ, −ε, ε), F ≥ F(0) = 0.

    Args:
        a: (n, n) symmetric, no eigenvalue below 0; b: (n, d); mu: μ > 0; epsilon: ε > 0, infinity for no box.
        noise: s ≥ 0; batch: examples per step; weights: (w₁, w₂).

    Raises:
        ValueError: shapes that do not fit, an A that is not positive semi-definite, a number out of range.

    >>> flat = Quadratic(a=np.zeros((1, 1)), b=np.eye(1), weights=(0, 1))
    >>> flat.objective(np.array([[0.5]])).item()  # ½ θ² / μ inside the box
    0.125
    """

    a: Array
    b: Array
    mu: float = 1.0
    epsilon: float = 1.0
    noise: float = 1.0
    batch: int = 1
    weights: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        size = len(self.a)
        fits = self.a.shape == (size, size) and self.b.ndim == 2 and len(self.b) == size
        shapes = f"{self.a.shape} and {self.b.shape}"
        require(fits and 0 not in self.b.shape, "the shape of A and B", shapes, "(n, n) and (n, d)")
        fine = np.array_equal(self.a, self.a.T) and np.linalg.eigvalsh(self.a)[0] >= -1e-12
        require(fine, "A", self.a.tolist(), "a symmetric matrix without negative eigenvalues")
        for name, value, good, allowed in (
            ("mu", self.mu, 0 < self.mu < np.inf, "above 0"),
            ("epsilon", self.epsilon, self.epsilon > 0, "above 0"),
            ("noise", self.noise, 0 <= self.noise < np.inf, "at least 0"),
            ("batch", self.batch, self.batch >= 1, "a whole number of at least 1"),
            ("weights", self.weights, min(self.weights) >= 0 < sum(self.weights), "at least 0, not both 0"),
        ):
            require(good, name, value, allowed)

    def pull(self, theta: Array) -> Array:
        """The input gradient of the clean image, Bᵀθ: (…, n) to (…, d)."""
        return theta @ self.b

    def maximiser(self, theta: Array) -> Array:
        """δ*(θ), (…, d)."""
        return np.clip(self.pull(theta) / self.mu, -self.epsilon, self.epsilon)

    def gain(self, theta: Array, delta: Array) -> Array:
        """ℓ(θ, δ; ξ) − ℓ(θ, 0; ξ), (…,): how much a perturbation raises the loss."""
        return (self.pull(theta) * delta).sum(-1) - self.mu / 2 * (delta**2).sum(-1)

    def objective(self, theta: Array) -> Array:
        """F(θ), (…,)."""
        clean = 0.5 * ((theta @ self.a) * theta).sum(-1)
        return sum(self.weights) * clean + self.weights[1] * self.gain(theta, self.maximiser(theta))

    def gradient(self, theta: Array, delta: Array | None = None) -> Array:
        """Mean gradient (…, n) with perturbations (…, d); None: the maximiser, which gives ∇F(θ)."""
        delta = self.maximiser(theta) if delta is None else delta
        return sum(self.weights) * (theta @ self.a) + self.weights[1] * (delta @ self.b.T)

    def top_eigenvalue(self, theta: Array) -> float:
        """λmax of the Hessian of F at one θ (n,); components of δ* on the box's boundary add no curvature."""
        inside = np.abs(self.pull(theta)) < self.mu * self.epsilon
        bent = self.b[:, inside] @ self.b[:, inside].T / self.mu
        return float(np.linalg.eigvalsh(sum(self.weights) * self.a + self.weights[1] * bent)[-1])

    @property
    def variance(self) -> float:
        """σ²: of one example's gradient, exact, since ξ enters both halves of the loss linearly."""
        return sum(self.weights) ** 2 * len(self.a) * self.noise**2


def example(
    size: int = 8, noise: float = 0.3, curvature: float = 0.1, seed: int = 0, batch: int = 1
) -> Quadratic:
    """A problem whose curvature comes mostly from the maximisation, so that staleness matters.

    A has eigenvalues from 0 to ``curvature``, B singular values from 0.3 to 1; μ = 1, ε = 1, weights (1, 1).
    """
    draw = np.random.default_rng(derived_seed(seed, "quadratic"))
    left, right, own = (np.linalg.qr(draw.normal(size=(size, size)))[0] for _ in range(3))
    a = own @ np.diag(np.linspace(0, curvature, size)) @ own.T
    return Quadratic(
        (a + a.T) / 2, left @ np.diag(np.linspace(0.3, 1, size)) @ right, noise=noise, batch=batch
    )


def solve(problem: Quadratic, theta: Array, solver: str, steps: int = 3, rate: float = 0.5) -> Array:
    """An approximate maximiser of ℓ(θ, ·) over the box, (…, d).

    ``"exact"`` is δ*(θ). ``"ascent"`` takes ``steps`` projected gradient steps of length ``rate``/μ from δ = 0,
    each of which shrinks every coordinate's error by the factor 1 − ``rate``. ``"sign"`` is one sign step from
    δ = 0, ε · sign(Bᵀθ) with sign(0) = +1, like the attack on images.

    Raises:
        ValueError: an unknown solver.
    """
    if solver == "exact":
        return problem.maximiser(theta)
    pull = problem.pull(theta)
    if solver == "sign":
        return np.where(pull >= 0, problem.epsilon, -problem.epsilon)
    if solver != "ascent":
        raise unknown("solver", solver, SOLVERS)
    delta = np.zeros_like(pull)
    for _ in range(steps):
        delta = np.clip(
            delta + rate * (pull / problem.mu - delta), -problem.epsilon, problem.epsilon
        )  # fmt: skip
    return delta


def inner_gap(problem: Quadratic, solver: str, steps: int = 3, rate: float = 0.5) -> float:
    """λ such that ‖δ̂ − δ*‖² ≤ λ/μ for every θ: 0 · μdε²(1 − rate)^(2·steps) · μdε², for the sign step."""
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    whole_box = problem.mu * problem.b.shape[1] * problem.epsilon**2
    return {"exact": 0.0, "ascent": whole_box * (1 - rate) ** (2 * steps), "sign": whole_box}[solver]


@dataclass(frozen=True)
class Path:
    """The result of a simulation.

    Attributes:
        squared_gradients: (steps,) ‖∇F(θ_t)‖², mean over the replicas; not finite if the run diverged.
        largest_step: the largest ‖θ_{t+1} − θ_t‖ of all steps and replicas.
        theta: (replicas, n) after the last step.
    """

    squared_gradients: Array
    largest_step: float
    theta: Array


def simulate(
    problem: Quadratic,
    start: Array,
    lr: float,
    taus: Taus,
    *,
    replicas: int = 64,
    solver: str = "exact",
    seed: int = 0,
    watch: Watch | None = None,
) -> Path:
    """Gradient descent θ ← θ − lr · g with perturbations computed at θ_{max(0, t−τ)}.

    The batch is split equally over the workers, each with its own τ; replicas differ only in ξ.

    Args:
        start: (n,) the first θ; taus: (steps, workers) of τ.
        watch: called before every step with t, θ_t and the θ that each worker's attack saw.

    Raises:
        ValueError: a trace with gaps or negative numbers, an unknown solver, a start of another size.
    """
    taus = checked(taus)
    size = len(problem.a)
    require(np.shape(start) == (size,), "the shape of the start", np.shape(start), f"({size},)")
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    steps = len(taus)
    kept = int(min(taus.max(), steps - 1)) + 1
    ring = np.empty((kept, replicas, size))
    draw = np.random.default_rng(derived_seed(seed, "quadratic noise"))
    spread = sum(problem.weights) * problem.noise / problem.batch**0.5
    theta, largest = np.tile(np.asarray(start, dtype=np.float64), (replicas, 1)), 0.0
    squares = np.empty(steps)
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged run shows in its values
        for t in range(steps):
            ring[t % kept] = theta
            seen = [ring[(t - min(int(tau), t)) % kept] for tau in taus[t]]
            if watch is not None:
                watch(t, theta, seen)
            squares[t] = (problem.gradient(theta) ** 2).sum(-1).mean()
            delta = np.mean([solve(problem, old, solver) for old in seen], axis=0)
            step = lr * (problem.gradient(theta, delta) + spread * draw.normal(size=theta.shape))
            largest = max(largest, float(np.sqrt((step**2).sum(-1).max())))
            theta = theta - step
    return Path(squares, largest, theta)
