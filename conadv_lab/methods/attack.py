"""Attacks on images: `perturb` computes with the current weights what `apply` later turns into adversarial images.

An attack changes neither the weights' gradients nor the running statistics. Images are floats in [0, 1], and so
are ε and step, unless the attack is told of other bounds. The direction is ascent on the true label (Goodfellow et al.
2015, Madry et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.ball import UNIT, Ball, Bounds, Norm, Value
from conadv_lab.methods.later import forwards, hashing, norm, torch
from conadv_lab.mistakes import require, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch
    from conadv_lab.data.tokens import Tokens
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.models.norm import Branch, Statistics

WARM_UPDATES = 10
"""Updates of the adversarial branch before its running statistics are used; until then batch statistics are."""


@dataclass(frozen=True)
class RadiusOptions:
    """Options of methods that perturb images."""

    epsilon: float = 1 / 255
    """Radius of the attack's ball, for images in [0, 1]. The paper's value is unknown."""

    def check(self) -> None:
        largest = 1.0 if getattr(self, "norm", "linf") == "linf" else math.inf
        require(0 <= self.epsilon <= largest, "epsilon", self.epsilon, f"0 to {largest:g}")


@dataclass(frozen=True)
class StepOptions(RadiusOptions):
    """Options of methods that perturb images in steps."""

    attack_step: float | None = None
    """Size of one attack step; None: epsilon; fgsm-rs: 1.25 epsilon; advprop with k > 1 steps: epsilon/(k - 1)."""

    def check(self) -> None:
        step = self.attack_step
        # A step of 0 would leave only the random start; it makes sense only with radius 0.
        fine = step is None or 0 < step < math.inf or (step == 0 and self.epsilon == 0)
        require(fine, "attack_step", step, "above 0, or None")


@dataclass(frozen=True)
class AttackOptions(StepOptions):
    """Options of methods that attack images."""

    attack_steps: int | None = None
    """Attack steps; 1 step in the L∞ ball is a sign attack, which stores one bit per pixel; None: 1, for advprop 5."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the attack's ball."""
    random_start: bool = True
    """Start the attack at a uniformly random point of the ball."""
    attack_branch: Literal["adversarial", "main"] = "adversarial"
    """Batch norm branch to attack."""
    attack_statistics: Literal["running", "batch"] = "running"
    """Batch norm statistics that the attack uses."""

    def check(self) -> None:
        fine = self.attack_steps is None or self.attack_steps >= 1
        require(fine, "attack_steps", self.attack_steps, "a whole number of at least 1, or None")


def attack_of(config: Config) -> Attack:
    """The attack specified by a config; the seed of random starts is derived from the run's."""
    section = config.method
    kind: Any = SignAttack
    more: dict[str, Any] = {"branch": section.attack_branch, "statistics": section.attack_statistics}
    if section.attack_steps > 1 or section.norm == "l2":
        kind, more = PGDAttack, more | {"steps": section.attack_steps, "norm": section.norm}
    step = section.attack_step or None  # ε = 0 means no step
    return kind(section.epsilon, step, section.random_start, config.training.seed, **more)


class Attack:
    """Base of the attacks.

    Args:
        epsilon: radius of the ball, in the images' units; a number, or one value per channel.
        step: length of one step; None is ``epsilon``.
        random_start: begin at a uniform point of the ball, which depends on (seed, epoch, image) alone.
        seed: of the random start.
        bounds: lowest and highest image value, each a number or one value per channel; None does not clip. See
            `conadv_lab.methods.ball.normalised`.
        branch: batch norm branch that is attacked.
        statistics: ``"running"`` attacks the network as it evaluates, ``"batch"`` as it trains.
    """

    steps = 1
    norm: Norm = "linf"
    kept_bytes: float = 4
    """Bytes stored per pixel value."""

    def __init__(
        self,
        epsilon: Value,
        step: Value | None = None,
        random_start: bool = True,
        seed: int = 0,
        *,
        bounds: Bounds = UNIT,
        branch: Branch = "adversarial",
        statistics: Statistics = "running",
    ) -> None:
        self.ball = Ball(epsilon, step, bounds, self.norm)
        if branch not in ("main", "adversarial"):
            raise unknown("branch", str(branch), ["main", "adversarial"])
        if statistics not in ("running", "batch"):
            raise unknown("batch norm statistics", str(statistics), ["running", "batch"])
        self.epsilon, self.step = self.ball.epsilon, self.ball.step
        self.random_start, self.seed = random_start, seed
        self.branch, self.statistics = branch, statistics

    def perturb(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
        """Attack ``batch`` with the current model; returns what has to be stored."""
        raise NotImplementedError

    def apply(self, batch: Batch, kept: Tensor) -> Tensor:
        """The adversarial images of ``batch`` from the result of `perturb`."""
        raise NotImplementedError

    def space(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor like the result of `perturb` for images of shape (B, C, H, W)."""
        raise NotImplementedError

    def gradient(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        criterion: Criterion,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """Input gradient (B, C, H, W) through the attacked branch."""
        statistics = self.seen_statistics(model)
        return input_gradient(model, images, labels, criterion, self.branch, statistics, tokens)

    def seen_statistics(self, model: nn.Module) -> Statistics:
        """Batch norm statistics that an attack on ``model`` uses now: the batch's until running ones are warmed up."""
        updates = norm.adversarial_updates(model)
        cold = self.branch == "adversarial" and updates is not None and updates < WARM_UPDATES
        return "batch" if cold else self.statistics


class SignAttack(Attack):
    """One step of size ``step`` along the sign of the input gradient; stores one bit per pixel.

    x̂ = clip[0,1](x + clip[−ε,ε](u + step · sign(∇ₓL(clip[0,1](x + u))))), u the random start or 0, sign(0) = +1.
    Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015; the random start as in
    Wong et al., "Fast is better than free", ICLR 2020.

    >>> SignAttack(epsilon=4)
    Traceback (most recent call last):
    ValueError: epsilon is 4; allowed: 0 to 1, as images are in [0, 1]
    """

    kept_bytes = 1 / 8

    def perturb(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
        self.ball.require_inputs(batch)
        start = self._start(batch)
        images = batch.images if start is None else self.ball.clip(batch.images + start)
        return self.ball.keep(self.gradient(model, images, batch.labels, criterion, batch.tokens))

    def apply(self, batch: Batch, kept: Tensor) -> Tensor:
        delta, start = self.ball.taken(kept, batch.images), self._start(batch)
        return self.ball.moved(batch.images, delta if start is None else delta.add_(start))

    def space(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape[0], -(-math.prod(shape[1:]) // 8), dtype=torch.uint8, device="cpu")

    def _start(self, batch: Batch) -> Tensor | None:
        return linf_start(batch, self.ball, self.seed) if self.random_start else None


class PGDAttack(Attack):
    """k projected steps in the L∞ or L2 ball; stores the perturbation as floats, 4 bytes per value.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. The random start in
    the L2 ball uses logarithms and cosines, whose last bits may differ between CPU and CUDA.
    """

    def __init__(
        self,
        epsilon: Value,
        step: Value | None = None,
        random_start: bool = True,
        seed: int = 0,
        *,
        steps: int = 10,
        norm: Norm = "linf",
        bounds: Bounds = UNIT,
        branch: Branch = "adversarial",
        statistics: Statistics = "running",
    ) -> None:
        require(isinstance(steps, int) and steps >= 1, "steps", steps, "a whole number of at least 1")
        self.steps, self.norm = steps, norm
        super().__init__(
            epsilon, step, random_start, seed, bounds=bounds, branch=branch, statistics=statistics
        )

    def perturb(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
        self.ball.require_inputs(batch)
        delta = self._start(batch)
        for _ in range(self.steps):
            images = self.ball.clip(batch.images + delta)
            gradient = self.gradient(model, images, batch.labels, criterion, batch.tokens)
            delta = self.ball.project(delta + self.ball.along(gradient))
            if self.ball.bounds is not None:
                delta = self.ball.clip(batch.images + delta) - batch.images
        return delta

    def apply(self, batch: Batch, kept: Tensor) -> Tensor:
        return self.ball.clip(batch.images + kept)

    def space(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    def _start(self, batch: Batch) -> Tensor:
        if not self.random_start:
            return torch.zeros_like(batch.images)
        start = linf_start if self.norm == "linf" else l2_start
        return start(batch, self.ball, self.seed)


def input_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion,
    branch: Branch,
    statistics: Statistics,
    tokens: Tokens | None = None,
) -> Tensor:
    """∇ₓ of the mean loss, (B, C, H, W), in evaluation mode apart from the requested statistics.

    Computes no parameter gradients and leaves running statistics unchanged. Of a DistributedDataParallel network it
    attacks the inner module, so that no rank waits for another.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    images = images.detach().requires_grad_()
    with _frozen(model), norm.branch_of(model, branch, statistics), torch.enable_grad():
        outputs = forwards.outputs_of(model, images, tokens)
        judge = criterion if isinstance(outputs, torch.Tensor) else forwards.Judge(criterion)
        (gradient,) = torch.autograd.grad(judge(outputs, labels), images)
    return gradient


def linf_start(batch: Batch, ball: Ball, seed: int) -> Tensor:
    """Uniform in the L∞ ball: the same bits on any device, for any split over micro-batches and ranks."""
    keys = hashing.image_keys(seed, "start", batch.epochs, batch.indices)
    values = hashing.uniform(keys, batch.images[0].numel()).view(batch.images.shape)
    return ball.start(values).to(batch.images.dtype)


def l2_start(batch: Batch, ball: Ball, seed: int) -> Tensor:
    """Uniform in the L2 ball: a normal direction (Box and Muller 1958), a radius of ε · u^(1/d); 0 at padding."""
    keys = hashing.image_keys(seed, "start", batch.epochs, batch.indices)
    size = batch.images[0].numel()
    draws = hashing.uniform(keys, 2 * size + 1)
    lengths = (-2 * torch.log1p(-draws[:, :size])).sqrt_()
    normal = lengths.mul_(torch.cos(2 * math.pi * draws[:, size:-1]))
    free: Any = size
    mask = None if batch.tokens is None else batch.tokens.mask
    if mask is not None:
        real = mask.to(normal.dtype).repeat_interleave(size // mask.shape[1], dim=1)
        normal, free = normal * real, real.sum(1, keepdim=True).clamp_min(1)
    radii = ball.epsilon * draws[:, -1:] ** (1 / free)
    normal = normal * (radii / normal.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return normal.view(batch.images.shape).to(batch.images.dtype)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; restores each module and parameter."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
