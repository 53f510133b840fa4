"""Attacks towards a class that is not the true one: what an attack climbs is minus the loss of that class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from conadv_lab.methods.attack import PGDAttack
from conadv_lab.methods.later import forwards, hashing
from conadv_lab.mistakes import require, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.data.loader import Batch
    from conadv_lab.methods.forwards import Criterion

Target = Literal["true", "random", "least-likely"]


@dataclass(frozen=True)
class TargetOptions:
    """Of attacks that may lead to a class."""

    attack_target: Target = "true"
    """Away from the true class, or towards another: one at random, or the least likely where the attack starts."""

    def check(self) -> None:
        if self.attack_target not in get_args(Target):
            raise unknown("attack_target", self.attack_target, get_args(Target))


class TargetedAttack(PGDAttack):
    """`PGDAttack` towards a class, of which the steps lower the loss (Kurakin et al., "Adversarial machine learning at
    scale", ICLR 2017).

    Args:
        target: ``"random"`` is any other class, drawn by (seed, epoch, image); ``"least-likely"`` is the one of lowest
            logit where the attack starts, so that no forward is made for it.
        rest: as for `PGDAttack`.
    """

    def __init__(
        self, epsilon: float, *rest: Any, target: Literal["random", "least-likely"] = "random", **more: Any
    ) -> None:
        super().__init__(epsilon, *rest, **more)
        if target not in ("random", "least-likely"):
            raise unknown("target", str(target), ["random", "least-likely"])
        self.target = target

    def perturb(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
        return super().perturb(model, batch, _Towards(criterion, self.target, batch, self.seed))


class _Towards:
    """Minus the loss of a class that is chosen at the first call and stays."""

    def __init__(self, criterion: Criterion, target: str, batch: Batch, seed: int) -> None:
        self.criterion, self.target, self.batch, self.seed = criterion, target, batch, seed
        self.chosen: Tensor | None = None

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.chosen is None:
            self.chosen = self._choice(forwards.logits(outputs).detach(), labels)
        return -self.criterion(outputs, self.chosen)

    def _choice(self, logits: Tensor, labels: Tensor) -> Tensor:
        shape = tuple(logits.shape)
        allowed = "(images, classes) with at least 2 classes, as an attack towards a class needs another one"
        require(logits.ndim == 2 and shape[1] > 1, "the shape of the outputs", shape, allowed)
        if self.target == "least-likely":
            return logits.argmin(1)
        true = labels.argmax(1) if labels.ndim == 2 else labels  # of mixed images the larger part
        keys = hashing.image_keys(self.seed, "target", self.batch.epochs, self.batch.indices)
        # The largest draw, 1 − 2⁻²⁴, times the number of other classes may be rounded up to it.
        others = (hashing.uniform(keys, 1)[:, 0] * (shape[1] - 1)).long().clamp_max(shape[1] - 2)
        return (true + 1 + others) % shape[1]
