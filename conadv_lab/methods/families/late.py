"""Late SAM, and any other switch of methods during a run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conadv_lab import methods
from conadv_lab.methods.alone import ALONE, Gradients
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.weight_space import RhoOptions
from conadv_lab.mistakes import require, unknown

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.forwards import Criterion


@dataclass(frozen=True)
class LateOptions:
    """Options of `late-sam`."""

    early_method: str = "vanilla"
    """Method for most of the run; it reads its own options."""
    late_method: str = "sam"
    """Method for the last steps."""
    late_share: float = 0.1
    """Fraction of all steps trained with late_method."""

    def check(self) -> None:
        require(0 <= self.late_share <= 1, "late_share", self.late_share, "0 to 1")


class LateSAM(Method):
    """One method for most of the run and another one for its last steps; by default SAM after vanilla.

    "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training", arXiv 2410.10373: SGD, and SAM
    in the last 6 to 12 % of the steps. It is not specific to SAM: any two methods with the same number of images per
    step work. The late one starts as at the beginning of a run, with no state from earlier steps.

    Args:
        early, late: the methods.
        share: fraction of all steps, rounded to whole steps, for the late one; 0.1 is ours, within the paper's range.

    >>> from conadv_lab.methods.base import Vanilla
    >>> from conadv_lab.methods.families.sam import SAM
    >>> late = LateSAM(Vanilla(), SAM(), share=0.1)
    >>> late.gradient_evaluations, [late.first_late(steps) for steps in (10, 16, 3)]
    (1.1, [9, 14, 3])
    """

    name, label, colour, marker = "late-sam", "late SAM", "#661100", "<"
    about = "as `--early-method`, then as `--late-method` for the last `--late-share` of the steps"
    source = "arXiv 2410.10373, 2024"
    reads: tuple[type, ...] = (RhoOptions, LateOptions)

    def __init__(self, early: Method, late: Method, share: float = 0.1) -> None:
        require(0 <= share <= 1, "share", share, "0 to 1")
        if any(
            getattr(early, fact) != getattr(late, fact)
            for fact in ("clean_fraction", "new_fraction", "replays")
        ):
            raise ValueError(
                f"early_method is {early.name!r} and late_method {late.name!r}; allowed: two with the same number of "
                "images per step, so equal-cost forms do not mix with others"
            )
        self.early, self.late, self.share = early, late, share
        self._is_late = False
        self.clean_fraction = early.clean_fraction
        self.altered_fraction = self._mean(early.altered_fraction, late.altered_fraction)
        self.replays = early.replays
        self.lookahead = max(early.lookahead, late.lookahead)
        self.two_branches = early.two_branches or late.two_branches
        self.copies = max(early.copies, late.copies)
        self.gradient_evaluations = self._mean(early.gradient_evaluations, late.gradient_evaluations)
        self.depth = self._mean(early.depth, late.depth)
        self.together = early.together and late.together
        beside = self.gradient_evaluations - self.clean_fraction - self.altered_fraction
        if beside > 1e-9:  # the simulator adds this to the training passes
            self.side = "attack" if "ascent" not in (early.side, late.side) else "ascent"
            self.side_steps = beside * (1.5 if self.side == "attack" else 1)

    @property
    def new_fraction(self) -> float:
        return self.early.new_fraction

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        early, late = (_kind(config, field).of(config) for field in ("early_method", "late_method"))
        return cls(early, late, section.late_share)

    @classmethod
    def parts(cls, config: Config) -> list[type[Method]]:
        return [cls, *(_kind(config, field) for field in ("early_method", "late_method"))]

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        return {k: v for kind in cls.parts(config)[1:] for k, v in kind.filled(config).items()}

    def check(self, config: Config) -> None:
        for method in (self.early, self.late):
            method.check(config)

    def require_cut(self, images: int) -> None:
        for method in (self.early, self.late):
            method.require_cut(images)

    def attach(self, optimizer: Optimizer | None, gradients: Gradients = ALONE) -> None:
        super().attach(optimizer, gradients)
        for method in (self.early, self.late):
            method.attach(optimizer, gradients)

    def _mean(self, early: float, late: float) -> float:
        return early if early == late else (1 - self.share) * early + self.share * late

    def first_late(self, steps: int) -> int:
        """Number of the late method's first step in a run of ``steps`` steps."""
        return steps - round(self.share * steps)

    def at(self, step: Step) -> Method:
        """The method of a step."""
        return self.late if step.number >= self.first_late(step.last + 1) else self.early

    def kept_bytes(self, steps: float) -> float:
        return max(self.early.kept_bytes(steps), self.late.kept_bytes(steps))

    def step_cost(self, number: int, steps: int) -> tuple[float, float]:
        method = self.late if number >= self.first_late(steps) else self.early
        return method.step_cost(number, steps)

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        return self.at(step).begin(model, step, criterion)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        method = self.at(step)
        method.lanes = self.lanes
        return method.gradient(model, step, criterion)

    def end(self, step: Step) -> None:
        self.at(step).end(step)
        self._is_late = self.at(step) is self.late
        self.left_out = self.early.left_out + self.late.left_out

    def kind(self, step: Step) -> Hashable | None:
        kind = self.at(step).kind(step)
        return None if kind is None else (self.at(step) is self.late, kind)

    def offsets(self, step: Step) -> Sequence[int]:
        return self.at(step).offsets(step)

    def passes(self, step: Step) -> int:
        return self.at(step).passes(step)

    def probe(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[str, float]:
        return self.at(step).probe(model, step, criterion)

    def state_dict(self) -> dict[str, Any]:
        """State of the last step's method: the late one needs nothing from the early one."""
        state = (self.late if self._is_late else self.early).state_dict()
        return state | {"shared": {"is_late": self._is_late, "its": state.get("shared", {})}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shared = state["shared"]
        self._is_late = shared["is_late"]
        (self.late if self._is_late else self.early).load_state_dict(state | {"shared": shared["its"]})


def _kind(config: Config, field: str) -> type[Method]:
    """The class that a field of the config names; must not be this one."""
    name, allowed = getattr(config.method, field), [one for one in methods.METHODS if one != LateSAM.name]
    if name not in allowed:
        raise unknown(field, name, allowed)
    return methods.METHODS[name]
