"""EXTRAP: every worker moves along its own last gradient before it computes the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from conadv_lab.methods.base import Method
from conadv_lab.methods.later import hashing, moving, torch
from conadv_lab.methods.weight_space import PerturbationOptions, WeightSpace, Whose
from conadv_lab.mistakes import require_number, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.methods.moving import Move, Part

Direction = Literal["gradient", "noise"]


@dataclass(frozen=True)
class ExtrapOptions:
    """Options of `extrap`."""

    extrapolation: float = 1.0
    """γ̂ in units of the learning rate."""
    extrapolate_along: Literal["gradient", "noise"] = "gradient"
    """Move along the worker's last gradient, or along random signs of the same norm."""

    def check(self) -> None:
        require_number(extrapolation=self.extrapolation)
        if self.extrapolate_along not in ("gradient", "noise"):
            raise unknown("extrapolate_along", str(self.extrapolate_along), ("gradient", "noise"))


class Extrap(WeightSpace):
    """EXTRAP-SGD and EXTRAP-LARS: the gradient is computed ahead of the weights, along the worker's last one.

    Lin et al., "Extrapolation for Large-batch Training in Deep Learning", ICML 2020. Only the abstract was read;
    the formula is **from memory, unchecked against the paper**. For each worker k, with its gradient before all-reduce:

        w̃_k = w_t − γ̂ g_{k,t−1}        g_{k,t} = ∇L_k(w̃_k)        step with the mean of g_{k,t} over k

    and variants with i.i.d. noise instead of g_{k,t−1}. That the move goes down the gradient is according to MSAM's
    authors. **γ̂ was not found and is ours**: ``extrapolation`` times the learning rate of the weight's parameter group.
    So is the LARS form: γ̂ is multiplied by the tensor's trust ratio at w_t and g_{k,t−1}, so that the move is as long
    as LARS's own step without momentum. So is the noise: random signs, in each tensor with the norm of g_{k,t−1}.

    A worker is a rank; with ``perturbation="micro-batch"`` it is a micro-batch, on any number of ranks, and with
    ``"global"`` the whole step. The first step does not move. One gradient.

    In your own loop call ``method.attach(optimizer)``.
    """

    name, label, colour, marker = "extrap", "EXTRAP", "#AA4499", "H"
    about = "B clean images, with the gradient at w − γ̂ g, where g is the worker's own gradient of the previous step"
    source = "Lin et al., ICML 2020 (formula from memory)"
    reads = (PerturbationOptions, ExtrapOptions)
    own_perturbation = "rank"
    staleness = 1
    keeps = 1
    copies = 4

    def __init__(
        self,
        extrapolation: float = 1.0,
        perturbation: Whose | None = None,
        along: Direction = "gradient",
        seed: int = 0,
    ) -> None:
        super().__init__(0.0, perturbation)
        require_number(extrapolation=extrapolation)
        if along not in ("gradient", "noise"):
            raise unknown("direction", str(along), ("gradient", "noise"))
        self.extrapolation, self.along, self.seed = extrapolation, along, seed
        self._number: Tensor | None = None  # of the step, where the device reads it

    @classmethod
    def of(cls, config: Config) -> Method:
        method = config.method
        return cls(method.extrapolation, method.perturbation, method.extrapolate_along, config.training.seed)

    def check(self, config: Config) -> None:
        if config.optimization.optimizer == "lamb":
            raise ValueError(
                f"optimizer is 'lamb'; allowed for {self.name}: 'sgd' or 'lars', for which it is defined"
            )

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        criterion = super().begin(model, step, criterion)
        if self.along == "noise":
            if self._number is None:
                device = next(model.parameters()).device
                self._number = torch.empty((), dtype=torch.int64, device=device)
            self._number.fill_(step.number)
        return criterion

    def stale_move(self, part: Part, step: Step) -> Move | None:
        direction = part.kept[0]
        if self.along == "noise":
            direction = self._noise(part)
        with torch.no_grad():
            steps = moving.rates(self.needed_optimizer(), part.weights, part.kept[0])
            ahead = part.weights.room
            for one, rate, room in zip(direction, steps, ahead, strict=True):
                torch.mul(one, rate, out=room)
            return moving.Move(ahead, ahead[0].new_full((), -self.extrapolation))

    def _noise(self, part: Part) -> list[Tensor]:
        """For each weight random signs times ‖g‖/√n of its gradient, the same on any machine."""
        assert self._number is not None
        last = part.kept[0]
        places = torch.arange(len(last), device=self._number.device)
        keys = hashing.image_keys(self.seed, f"extrapolation {part.number}", self._number, places)
        with torch.no_grad():
            drawn = []
            for key, one in zip(keys.split(1), last, strict=True):
                signs = hashing.signs(key, one.numel()).to(one.dtype).view(one.shape)
                drawn.append(signs * (one.norm() / one.numel() ** 0.5))
            return drawn
