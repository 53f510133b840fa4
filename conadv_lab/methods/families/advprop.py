"""AdvProp, and fast AdvProp, which reuses its attack's weight gradient."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.attack import (
    AttackOptions,
    RadiusOptions,
    SignAttack,
    StepOptions,
    attack_of,
    linf_start,
)
from conadv_lab.methods.ball import UNIT, Bounds, Value
from conadv_lab.methods.base import Losses, Method, WeightOptions, Weights
from conadv_lab.methods.families.conadv import ConAdv, Placement, StaleOptions
from conadv_lab.methods.later import norm, steps
from conadv_lab.methods.targets import TargetedAttack, TargetOptions
from conadv_lab.mistakes import require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.attack import Attack
    from conadv_lab.methods.forwards import Criterion

STEPS = 5
"""Default number of AdvProp's attack steps."""


class AdvProp(ConAdv):
    """Adversarial propagation: clean images and the same under a k-step attack, each kind with its own batch norm.

    Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020. It is `ConAdv` with `PGDAttack` or
    `TargetedAttack`, with ConAdv's queue: with τ = 0 a step waits for its own attack as in the paper, with τ ≥ 1
    the attack is stale. The loss is the mean of both kinds, (½, ½) (from a public port); 5 steps of ε/4 are the
    paper's at ε = 4/255 (from memory: k = ε + 1 steps of 1/255, one at ε = 1/255). Random target classes follow the
    port, in which at least a fifth of the batches starts without noise; that is left out here.

    Args:
        attack, first, placement: as for `ConAdv`.
        staleness: τ ≥ 0.
        weights: loss weights of the clean and the adversarial mean loss.

    >>> from conadv_lab.methods.attack import PGDAttack
    >>> method = AdvProp(PGDAttack(4 / 255, 1 / 255, steps=5))
    >>> round(method.gradient_evaluations, 2), method.depth
    (5.33, 6)
    """

    name, label, colour, marker = "advprop", "AdvProp", "#8C564B", "h"
    about = "B clean images and the same images under an attack of `--attack-steps` steps"
    source = "Xie et al., CVPR 2020"
    reads = (RadiusOptions, AttackOptions, TargetOptions, StaleOptions, WeightOptions)

    def __init__(
        self,
        attack: Attack,
        staleness: int = 0,
        weights: Weights = (0.5, 0.5),
        first: Literal["initial", "clean"] = "initial",
        placement: Placement | None = None,
    ) -> None:
        super().__init__(attack, staleness, weights, first, placement)

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        count = config.method.attack_steps or STEPS
        step = config.method.epsilon / max(1, count - 1)
        return {"attack_steps": count, "attack_step": step, "staleness": 0}

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        weights = section.weights or (0.5, 0.5)
        return cls(_attack_of(config), section.staleness, weights, section.first)


def _attack_of(config: Config) -> Attack:
    section = config.method
    if section.attack_target == "true":
        return attack_of(config)
    return TargetedAttack(
        section.epsilon,
        section.attack_step or None,  # ε = 0 leaves no step to take
        section.random_start,
        config.training.seed,
        target=section.attack_target,
        steps=section.attack_steps,
        norm=section.norm,
        branch=section.attack_branch,
        statistics=section.attack_statistics,
    )


class FastAdvProp(Method):
    """Fast AdvProp: attacks one extra image per four clean ones, and also trains on the attack's gradient.

    Mei et al., "Fast AdvProp", ICLR 2022, and their code. Of every five images in a micro-batch the first four are
    clean and go through the main branch. The fifth is moved to a random start and goes through the adversarial branch
    in training mode; that pass gives the image's gradient, along whose sign the image is moved, and a weight gradient,
    which is kept; then the moved image goes through the adversarial branch again.

    The images of the three passes have weights 1, ½ and ½, and each parameter's gradient is divided by the weights of
    the images that it sees. With four clean images per attacked one that is

    - main batch norm: ∇L(clean);
    - adversarial batch norm: ½ ∇L(start) + ½ ∇L(moved);
    - everything else, which sees all: 0.8 ∇L(clean) + 0.1 ∇L(start) + 0.1 ∇L(moved), L a mean.

    In an epoch each image is seen either clean or attacked, as the authors count (105 epochs are 105/1.2 of these at
    equal cost). Two differences from their code: attacked images are not shuffled between groups before the last pass,
    and all starts are random (their default skips more than half of them). There is no stale form: the attack's pass
    is one of the step's training passes.

    Args:
        epsilon: radius of the L∞ ball, in the images' units; a number, or one value per channel.
        step: size of the attack step; None: ``epsilon``.
        weights: of an image in the clean, the start's and the moved pass.
        seed: of the random start.
        bounds: lowest and highest image value, as for `SignAttack`.
    """

    name, label, colour, marker = "fast-advprop", "fast AdvProp", "#E377C2", "H"
    about = "B clean images and B/4 others, attacked, reusing the weight gradient of the attack's own pass"
    source = "Mei et al., ICLR 2022"
    reads = (StepOptions,)
    altered_fraction = 0.25
    side = "ascent"
    side_share = 0.25
    two_branches = True
    new_fraction = 1.25

    def __init__(
        self,
        epsilon: Value,
        step: Value | None = None,
        weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
        seed: int = 0,
        *,
        bounds: Bounds = UNIT,
    ) -> None:
        self.attack = SignAttack(epsilon, step, seed=seed, bounds=bounds)
        fine = len(weights) == 3 and min(weights) >= 0 < min(weights[0], weights[1] + weights[2])
        require(fine, "weights", weights, "three numbers of at least 0, the first and one other above 0")
        self.weights = weights

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        return cls(section.epsilon, section.attack_step or None, seed=config.training.seed)

    def require_cut(self, images: int) -> None:
        allowed = "a multiple of 5 on each rank: four clean images per attacked one"
        require(images % 5 == 0, "images of a micro-batch", images, allowed)

    def passes(self, step: Step) -> int:
        return 3

    def kind(self, step: Step) -> Hashable:
        return "both"

    def offsets(self, step: Step) -> Sequence[int]:
        return (0,)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        main, adversarial = _branch_parameters(model)
        clean, start, moved = 4 * self.weights[0], self.weights[1], self.weights[2]
        total = clean + start + moved
        parts = clean / total, start / total, moved / total
        factors = (total / clean, main), (total / (start + moved), adversarial)
        with norm.one_update(model), _multiplied(factors):
            return steps.totals(self._train(model, batch, criterion, parts) for batch in step.batches())

    def _train(
        self, model: nn.Module, batch: Batch, criterion: Criterion, parts: tuple[float, float, float]
    ) -> tuple[Tensor, Tensor]:
        self.require_cut(len(batch.labels))
        own, others = _clean_and_others(batch)
        clean = steps.train_on(model, own.images, own, criterion, parts[0], "main")
        ball = self.attack.ball
        ball.require_inputs(batch)
        start = linf_start(others, ball, self.attack.seed)
        start = ball.clip(start.add_(others.images)).requires_grad_()
        steps.train_on(model, start, others, criterion, parts[1], "adversarial")
        moved = self.attack.apply(others, ball.keep(steps.gradient_of(start)))
        return clean, steps.train_on(model, moved, others, criterion, parts[2], "adversarial")


def _clean_and_others(batch: Batch) -> tuple[Batch, Batch]:
    """The first four and the last of every five images; splitting at multiples of five does not change them."""
    names = ("images", "labels", "epochs", "indices")
    fives = {name: getattr(batch, name).unflatten(0, (-1, 5)) for name in names}
    return (
        replace(batch, **{name: values[:, :4].flatten(0, 1) for name, values in fives.items()}),
        replace(batch, **{name: values[:, 4] for name, values in fives.items()}),
    )


def _branch_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the main branch and those of the adversarial branch."""
    norms = [module for module in model.modules() if isinstance(module, norm.MixtureBatchNorm)]

    def learning(branches: Iterator[nn.Module]) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for one in branches for p in one.parameters() if p.requires_grad))

    return learning(one.main for one in norms), learning(one.adversarial for one in norms)


@contextmanager
def _multiplied(factors: Sequence[tuple[float, Sequence[nn.Parameter]]]) -> Iterator[None]:
    """Inside, scale what a backward pass adds to these parameters' gradients, before ranks send it."""

    def times(factor: float) -> Any:
        return lambda gradient: gradient * factor

    handles = [p.register_hook(times(factor)) for factor, parameters in factors for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
