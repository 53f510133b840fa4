"""Learning rates as pure functions of the step: resuming needs no state."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, isfinite, pi, sqrt

from conadv_lab.mistakes import require, unknown
from conadv_lab.optim.options import Length, Optimization

_RULES: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,
    "sqrt": sqrt,
    "none": lambda ratio: 1.0,
}
_DECAYS = ("constant", "cosine", "polynomial", "step")


def scaled_lr(lr: float, batch: int, base_batch: int, rule: str = "linear") -> float:
    """The learning rate for ``batch``, given one tuned for ``base_batch``.

    Args:
        lr: learning rate at the base batch.
        batch: global batch in clean images, at least 1.
        base_batch: the batch that ``lr`` was tuned for, at least 1.
        rule: "linear" (Goyal et al. 2017, section 2.1), "sqrt" (Krizhevsky 2014; Hoffer et al. 2017,
            equation 7) or "none".

    Raises:
        ValueError: a batch below 1 or an unknown rule.

    >>> scaled_lr(0.1, 8192, 256), scaled_lr(0.1, 1024, 256, rule="sqrt")
    (3.2, 0.2)
    """
    require(batch >= 1, "batch", batch, "a whole number of at least 1")
    require(base_batch >= 1, "base_batch", base_batch, "a whole number of at least 1")
    if rule not in _RULES:
        raise unknown("scaling rule", rule, _RULES)
    return lr * _RULES[rule](batch / base_batch)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to ``lr``, then decay: call it with a step, counted from 0, for its learning rate.

    Step t < ``warmup`` takes lr · (t+1) / warmup (Goyal et al. 2017, section 2.2, without their offset).
    After it, with x = (t − warmup) / (steps − warmup), at most 1:

        constant     lr
        cosine       end + (lr − end) (1 + cos πx) / 2         Loshchilov, Hutter 2017, equation 5
        polynomial   end + (lr − end) (1 − x)^power            MLPerf's ResNet-50 with power 2
        step         lr · factor^(milestones reached)          He et al. 2016

    After step ``steps`` the last value stays.

    Args:
        lr: the highest learning rate, after scaling with the batch, at least 0.
        steps: length of the run in steps, warm-up included, at least 1.
        warmup: length of the warm-up in steps, from 0 to ``steps``.
        decay: "constant", "cosine", "polynomial" or "step".
        end: learning rate at the end of cosine and polynomial decay, from 0 to ``lr``.
        power: of the polynomial, above 0.
        milestones: steps, counted from the start of the run, at which step decay multiplies by ``factor``.
        factor: of step decay, in (0, 1].

    Raises:
        ValueError: a value outside its range, milestones that do not increase, or an unknown decay.

    >>> schedule = Schedule(lr=0.4, steps=8, warmup=4)
    >>> [round(schedule(step), 3) for step in range(9)]
    [0.1, 0.2, 0.3, 0.4, 0.4, 0.341, 0.2, 0.059, 0.0]
    """

    lr: float
    steps: int
    warmup: int = 0
    decay: str = "cosine"
    end: float = 0.0
    power: float = 2.0
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        require(self.lr >= 0 and isfinite(self.lr), "lr", self.lr, "a finite number of at least 0")
        require(self.steps >= 1, "steps", self.steps, "a whole number of at least 1")
        allowed = f"0 to {self.steps} steps, the length of the run"
        require(0 <= self.warmup <= self.steps, "warmup", self.warmup, allowed)
        if self.decay not in _DECAYS:
            raise unknown("decay", self.decay, _DECAYS)
        require(0 <= self.end <= self.lr, "end", self.end, f"0 to lr, which is {self.lr!r}")
        require(self.power > 0, "power", self.power, "a number above 0")
        rising = list(self.milestones) == sorted(set(self.milestones))
        require(rising, "milestones", self.milestones, "steps in increasing order")
        require(0 < self.factor <= 1, "factor", self.factor, "a number in (0, 1]")

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        require(step >= 0, "step", step, "a whole number of at least 0")
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        left = 1.0 - (step - self.warmup) / (self.steps - self.warmup) if step < self.steps else 0.0
        if self.decay == "cosine":
            return self.end + (self.lr - self.end) * (1 - cos(pi * left)) / 2
        if self.decay == "polynomial":
            return self.end + (self.lr - self.end) * left**self.power
        if self.decay == "step":
            return self.lr * self.factor ** sum(step >= milestone for milestone in self.milestones)
        return self.lr


def build_decay(section: Optimization, length: Length) -> Schedule:
    """Build it from a config's section.

    Raises:
        ValueError: a warm-up longer than the run.
    """
    assert section.lr is not None, "the config is not resolved"
    warmup = length.steps_of(section.warmup_epochs) if section.warmup_steps is None else section.warmup_steps
    if warmup > length.steps:
        name = "warmup_epochs" if section.warmup_steps is None else "warmup_steps"
        raise ValueError(
            f"{name} is {getattr(section, name):g}, {warmup} steps; allowed: at most the run's {length.steps}; "
            f"--{name.replace('_', '-')} 0 trains without a warm-up"
        )
    return Schedule(
        lr=section.lr,
        steps=length.steps,
        warmup=warmup,
        decay=section.schedule,
        end=section.end_lr,
        power=section.power,
        milestones=tuple(length.steps_of(epochs) for epochs in section.milestone_epochs),
        factor=section.decay_factor,
    )
