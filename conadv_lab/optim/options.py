"""The config's section for optimiser and learning rate, and both by name. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal, Protocol

from conadv_lab.mistakes import (
    ABOVE_0,
    BELOW_1,
    COUNT,
    COUNT_OR_0,
    FROM_0,
    SHARE,
    require,
    require_ranges,
    unknown,
)
from conadv_lab.registry import Entry, described


@dataclass(frozen=True)
class Rule(Entry):
    """A named optimiser; its function makes a torch optimiser from a section and parameter groups.

    Attributes:
        states: number of state values per parameter.
    """

    states: int = 1


OPTIMIZERS = {
    "sgd": Rule(
        "stochastic gradient descent with momentum",
        "conadv_lab.optim.sgd:build_sgd",
        reads=("momentum", "nesterov"),
    ),
    "lars": Rule(
        "momentum with layer-wise rates (You et al. 2017)",
        "conadv_lab.optim.lars:build_lars",
        reads=("momentum", "trust_coefficient", "lars_variant"),
    ),
    "lamb": Rule(
        "Adam with layer-wise rates (You et al. 2020)", "conadv_lab.optim.lamb:build_lamb", states=2
    ),
    "adamp": Rule(
        "Adam without steps along the weight (Heo et al. 2021); extra optim",
        "conadv_lab.optim.adamp:build_adamp",
        states=2,
    ),
}
"""Every optimiser by name; a new one is a file with its function and a line here."""


@dataclass(frozen=True)
class Rates(Entry):
    """A named schedule.

    Attributes:
        ceiling: default ``lr`` of a schedule that uses neither base_lr nor a warm-up.
    """

    ceiling: float | None = None


_DECAY = "conadv_lab.optim.schedule:build_decay"
_PEAK = ("base_lr", "base_batch", "lr_rule", "warmup_epochs", "warmup_steps")
SCHEDULES = {
    "cosine": Rates("falls to end_lr along half a cosine", _DECAY, reads=(*_PEAK, "end_lr")),
    "polynomial": Rates(
        "falls to end_lr, as a power of the remaining fraction of the run",
        _DECAY,
        reads=(*_PEAK, "end_lr", "power"),
    ),
    "step": Rates(
        "falls by decay_factor at each of milestone_epochs",
        _DECAY,
        reads=(*_PEAK, "milestone_epochs", "decay_factor"),
    ),
    "constant": Rates("stays", _DECAY, reads=_PEAK),
    "autowu": Rates(
        "AutoWU (Kim et al. 2021): grows from first_lr towards lr until the loss turns, returns to its value where "
        "the loss was lowest, and falls to end_lr; without warm-up",
        "conadv_lab.optim.autowu:build_autowu",
        ceiling=1.0,
        reads=("first_lr", "cooldown", "end_lr"),
    ),
}
"""Schedules after the warm-up by name; a new one is a function listed here that makes, from a section and a `Length`,
a function from a step, counted from 0, to its learning rate."""


class Length(Protocol):
    """The length and seed of a run, as of a stream."""

    steps: int
    seed: int

    def steps_of(self, epochs: float) -> int: ...


@dataclass(frozen=True)
class Optimization:
    """Optimiser and learning-rate schedule."""

    optimizer: str = "sgd"
    """One of the names above."""
    lr: float | None = None
    """Peak learning rate, after scaling; None: base_lr scaled by lr_rule from base_batch, or autowu's own 1."""
    base_lr: float = 0.1
    """Learning rate at base_batch."""
    base_batch: int = 256
    """Global batch that base_lr was tuned for."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate scales with the global batch."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 5e-4
    """L2 decay, not applied to batch norm and biases."""
    bias_lr_factor: float = 1.0
    """Learning rate of batch norm's biases, relative to all other parameters."""
    trust_coefficient: float = 0.001
    """Trust coefficient η of lars."""
    lars_variant: Literal["A", "B", "C"] = "B"
    """Which published definition of lars to use."""
    schedule: str = "cosine"
    """One of the names above: the learning rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, instead of warmup_epochs."""
    end_lr: float = 0.0
    """Learning rate at the end of cosine and polynomial decay, and of autowu."""
    power: float = 2.0
    """Power of polynomial decay."""
    milestone_epochs: tuple[float, ...] = ()
    """Epochs at which step decay multiplies by decay_factor."""
    decay_factor: float = 0.1
    """Factor of step decay."""
    first_lr: float = 1e-5
    """Initial learning rate of autowu."""
    cooldown: float = 0.2
    """Fraction of all steps, at the end, over which autowu's learning rate falls; 1: as soon as its growth ends."""
    adaptive_clipping: float = 0.0
    """Adaptive clipping: largest gradient norm of a unit relative to its weight's (Brock et al. 2021: 0.01); 0: off."""
    label_smoothing: float = 0.0
    """Label smoothing of the training criterion, also used by the attack."""

    def check(self) -> None:
        """Raise ``ValueError`` at the first invalid value or combination."""
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        require_ranges(
            self,
            lr=FROM_0,
            base_lr=FROM_0,
            base_batch=COUNT,
            momentum=BELOW_1,
            weight_decay=FROM_0,
            bias_lr_factor=FROM_0,
            trust_coefficient=ABOVE_0,
            warmup_epochs=FROM_0,
            warmup_steps=COUNT_OR_0,
            end_lr=FROM_0,
            first_lr=ABOVE_0,
            cooldown=SHARE,
            adaptive_clipping=FROM_0,
            power=ABOVE_0,
            label_smoothing=BELOW_1,
        )
        fine = all(FROM_0[0](epoch) for epoch in self.milestone_epochs)
        require(fine, "milestone_epochs", self.milestone_epochs, "epochs of at least 0")
        if self.schedule == "step" and not self.milestone_epochs:
            raise ValueError("milestone_epochs is (); allowed with schedule 'step': at least one epoch")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov is True; allowed: with optimizer sgd and a momentum above 0 only")


Optimization.__doc__ = (
    f"{Optimization.__doc__}\n\n{described('Optimisers', OPTIMIZERS)}\n\n{described('Schedules', SCHEDULES)}"
)
