"""ConAdv with a separate τ for every step and worker, using stored weights."""

import copy
from typing import Any

from torch import Tensor, nn

from conadv_lab.data.loader import Step
from conadv_lab.methods.attack import Attack
from conadv_lab.methods.base import Losses, Weights
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.forwards import Criterion
from conadv_lab.mistakes import require
from conadv_lab.staleness.draws import checked


class SnapshotConAdv(ConAdv):
    """Train on images attacked with the weights from τ steps ago, where τ may vary with every step.

    ConAdv's look-ahead queue must know in advance which later step a batch is for; a random τ or one from a cluster's
    trace does not say so. So this stores the latest states (weights and running statistics at the start of each step)
    and attacks a step's own images with an old one. For constant τ both are equal bit for bit. The training half of a
    step is ConAdv's own.

    A step's micro-batches are assigned to the workers in turn: micro-batch i is attacked by worker i mod W with that
    worker's τ. Before step τ the initial weights are used (``first="initial"``).

    Args:
        attack: how an image is attacked.
        taus: (steps, workers) whole numbers of at least 0; memory grows with the largest, by one state per step.
        weights: loss weights, clean and adversarial.

    Raises:
        ValueError: a trace with gaps or negative numbers; in a step, fewer groups than workers, or a trace too short.
    """

    def __init__(self, attack: Attack, taus: Any, weights: Weights = (1, 1)) -> None:
        super().__init__(attack, staleness=0, weights=weights)
        self.taus = checked(taus)
        self.kept = int(min(self.taus.max(), len(self.taus) - 1))
        self._states: dict[int, dict[str, Tensor]] = {}
        self._old: nn.Module | None = None
        self._loaded: int | None = None

    @property
    def workers(self) -> int:
        return self.taus.shape[1]

    def lag(self, number: int, group: int) -> int:
        """Effective τ of a micro-batch: the age in steps of the weights it is attacked with."""
        require(number < len(self.taus), "the trace's number of steps", len(self.taus), f"above {number}")
        return min(int(self.taus[number, group % self.workers]), number)

    def remember(self, model: nn.Module, number: int) -> None:
        """Store the state at the start of step ``number``; drop those that no later step can need."""
        if number == 0:
            self._states.clear()
            self._old = self._loaded = None
        if self.kept and number not in self._states:
            self._states[number] = {name: value.clone() for name, value in model.state_dict().items()}
            self._states.pop(number - self.kept - 1, None)

    def state_at(self, number: int) -> dict[str, Tensor]:
        """Stored weights and statistics at the start of step ``number``."""
        return self._states[number]

    def model_at(self, model: nn.Module, number: int, lag: int) -> nn.Module:
        """The model as it was ``lag`` steps before the next step, ``number``; not for training."""
        if lag == 0:
            return model
        if self._old is None:
            self._old = copy.deepcopy(model)
        if self._loaded != number - lag:
            self._old.load_state_dict(self.state_at(number - lag))
            self._loaded = number - lag
        return self._old

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        self.remember(model, step.number)
        if step.number:  # at step 0 every τ is 0, as in ConAdv itself
            self.pending[step.number] = self._attacked(model, step, criterion)
        return super().backward(model, step, criterion)

    def _attacked(self, model: nn.Module, step: Step, criterion: Criterion) -> list[Tensor]:
        kept = []
        for group, batch in enumerate(step.batches()):
            old = self.model_at(model, step.number, self.lag(step.number, group))
            kept.append(self.attack.perturb(old, batch, criterion))
        require(len(kept) >= self.workers, "workers", self.workers, f"1 to {len(kept)}, the groups of a step")
        return kept
