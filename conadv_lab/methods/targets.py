"""Targeted attacks: ascent on minus the loss of a class that is not the true one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from conadv_lab.methods.attack import PGDAttack
from conadv_lab.methods.later import forwards, hashing
from conadv_lab.mistakes import require, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.data.loader import Batch
    from conadv_lab.methods.ball import Value
    from conadv_lab.methods.forwards import Criterion

Target = Literal["true", "random", "least-likely"]


@dataclass(frozen=True)
class TargetOptions:
    """Options of attacks that may be targeted."""

    attack_target: Target = "true"
    """Attack away from the true class, or towards another: a random one, or the least likely one at the start."""

    def check(self) -> None:
        if self.attack_target not in get_args(Target):
            raise unknown("attack_target", self.attack_target, get_args(Target))


class TargetedAttack(PGDAttack):
    """`PGDAttack` towards a class, whose loss the steps lower (Kurakin et al., "Adversarial machine learning at
    scale", ICLR 2017).

    Args:
        target: ``"random"``: any other class, determined by (seed, epoch, image); ``"least-likely"``: the one with the
            lowest logit at the attack's start, which needs no extra forward pass.
        rest: as for `PGDAttack`.
    """

    def __init__(
        self, epsilon: Value, *rest: Any, target: Literal["random", "least-likely"] = "random", **more: Any
    ) -> None:
        super().__init__(epsilon, *rest, **more)
        if target not in ("random", "least-likely"):
            raise unknown("target", str(target), ["random", "least-likely"])
        self.target = target

    def perturb(self, model: nn.Module, batch: Batch, criterion: Criterion) -> Tensor:
        return super().perturb(model, batch, _Towards(criterion, self.target, batch, self.seed))


class _Towards:
    """Minus the loss of a class that is chosen at the first call and then fixed."""

    def __init__(self, criterion: Criterion, target: str, batch: Batch, seed: int) -> None:
        self.criterion, self.target, self.batch, self.seed = criterion, target, batch, seed
        self.chosen: Tensor | None = None

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.chosen is None:
            self.chosen = self._choice(forwards.logits(outputs).detach(), labels)
        return -self.criterion(outputs, self.chosen)

    def _choice(self, logits: Tensor, labels: Tensor) -> Tensor:
        shape = tuple(logits.shape)
        allowed = "(images, classes) with at least 2 classes, as a targeted attack needs another class"
        require(logits.ndim == 2 and shape[1] > 1, "the shape of the outputs", shape, allowed)
        if self.target == "least-likely":
            return logits.argmin(1)
        true = labels.argmax(1) if labels.ndim == 2 else labels  # for mixed images the dominant class
        keys = hashing.image_keys(self.seed, "target", self.batch.epochs, self.batch.indices)
        # The largest uniform number, 1 − 2⁻²⁴, times the number of other classes may round up to it.
        others = (hashing.uniform(keys, 1)[:, 0] * (shape[1] - 1)).long().clamp_max(shape[1] - 2)
        return (true + 1 + others) % shape[1]
