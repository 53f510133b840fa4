"""The convergence bound of docs/theory.md: the most that stale maximisers can cost stochastic gradient descent.

The derivation is this project's own. The paper (Liu et al., ICLR 2022) states a bound whose constants we do not know,
so no number here is the paper's.
"""

from dataclasses import dataclass
from math import inf, sqrt

from conadv_lab.mistakes import require


@dataclass(frozen=True)
class Constants:
    """The constants in the bound; docs/theory.md states each assumption.

    Attributes:
        theta_theta: L_θθ, Lipschitz constant in θ of one example's weight gradient.
        theta_x: L_θx, the same in the image; x_theta: L_xθ, that of the input gradient in θ.
        mu: μ, strong concavity in the image, inside the ball.
        weights: loss weights (w₁, w₂), clean and adversarial.
        variance: σ² of one example's gradient given the past; batch: b, examples per step.
        excess: D = F(θ₀) − inf F.
        gap: λ of the inner solver: ‖x̂ − x*‖² ≤ λ/μ at the attacked weights.

    Raises:
        ValueError: a number out of range.

    >>> Constants(theta_theta=0.5, theta_x=2, x_theta=1, mu=4, weights=(1, 1)).smoothness
    1.5
    """

    theta_theta: float
    theta_x: float
    x_theta: float
    mu: float
    weights: tuple[float, float] = (1.0, 1.0)
    variance: float = 0.0
    batch: int = 1
    excess: float = 0.0
    gap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("theta_theta", "theta_x", "x_theta", "variance", "excess", "gap"):
            value = getattr(self, name)
            require(0 <= value < inf, name, value, "a number of at least 0")
        require(0 < self.mu < inf, "mu", self.mu, "a number above 0")
        require(self.batch >= 1, "batch", self.batch, "a whole number of at least 1")
        require(min(self.weights) >= 0 < sum(self.weights), "weights", self.weights, "at least 0, not both 0")

    @property
    def kappa(self) -> float:
        """κ = w₂ L_θx L_xθ / μ: how much old weights at distance 1 can change the gradient."""
        return self.weights[1] * self.theta_x * self.x_theta / self.mu

    @property
    def smoothness(self) -> float:
        """L_F = (w₁ + w₂) L_θθ + κ, Lipschitz constant of ∇F."""
        return sum(self.weights) * self.theta_theta + self.kappa

    @property
    def floor(self) -> float:
        """ρ = w₂ L_θx √(λ/μ): how much the inner solver's gap can change the gradient."""
        return self.weights[1] * self.theta_x * sqrt(self.gap / self.mu)

    def largest_lr(self, tau: int) -> float:
        """The largest step size that `bound` covers, 2 / (L_F + √(L_F² + 16κ²τ²)); 1/L_F without staleness."""
        root = sqrt(self.smoothness**2 + (4 * self.kappa * tau) ** 2)
        return 2 / (self.smoothness + root) if root else inf


def bound(constants: Constants, lr: float, steps: int, tau: int, mean_tau: float | None = None) -> float:
    """Upper bound on (1/T) Σ E‖∇F(θ_t)‖² of stale SGD; NaN if the step size is not covered.

        2D/(ηT) + (σ²/b) (L_F η + 4κ²η²τ̄) + 2ρ²,   if L_F η + 4κ²η²τ_max² ≤ 1

    docs/theory.md, theorem 1.

    Args:
        lr: η; steps: T; tau: the largest τ of any step and worker.
        mean_tau: τ̄, mean of the effective min(τ, t); None: ``tau``.

    Raises:
        ValueError: a number out of range.

    >>> bound(Constants(1, 1, 1, 1, excess=1.0), lr=0.1, steps=20, tau=1)
    1.0
    """
    _check(lr, steps, tau)
    mean = tau if mean_tau is None else mean_tau
    require(0 <= mean <= tau, "mean_tau", mean, f"0 to {tau}, the largest")
    c = constants
    if lr > c.largest_lr(tau) * (1 + 1e-12):
        return float("nan")
    noise = c.variance / c.batch * (c.smoothness * lr + 4 * (c.kappa * lr) ** 2 * mean)
    return 2 * c.excess / (lr * steps) + noise + 2 * c.floor**2


def bound_of_bounded_steps(constants: Constants, lr: float, steps: int, tau: int, length: float) -> float:
    """The second bound, for steps no longer than ``length`` and lr ≤ 1/L_F; NaN above it.

        2D/(ηT) + (σ²/b) L_F η + (κ τ ℓ + ρ)²

    docs/theory.md, theorem 2. It covers larger step sizes at large τ, and is looser where both apply.

    >>> round(bound_of_bounded_steps(Constants(1, 1, 1, 1, excess=1.0), 0.1, 20, tau=1, length=0.5), 9)
    1.25
    """
    _check(lr, steps, tau)
    require(length >= 0, "length", length, "a number of at least 0")
    c = constants
    if lr * c.smoothness > 1 + 1e-12:
        return float("nan")
    fresh = 2 * c.excess / (lr * steps) + c.variance / c.batch * c.smoothness * lr
    return fresh + (c.kappa * tau * length + c.floor) ** 2


def _check(lr: float, steps: int, tau: int) -> None:
    require(0 < lr < inf, "lr", lr, "a number above 0")
    require(steps >= 1, "steps", steps, "a whole number of at least 1")
    require(tau >= 0, "tau", tau, "a whole number of at least 0")
