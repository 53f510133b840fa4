"""ConAdv, and DisAdv, its variant without staleness."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.attack import Attack, AttackOptions, RadiusOptions, attack_of
from conadv_lab.methods.base import Losses, Method, StalenessOptions, TwoBranches, WeightOptions, Weights
from conadv_lab.methods.kept import Slots
from conadv_lab.methods.later import norm, signs, steps, torch
from conadv_lab.mistakes import require_count, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Batch, Step
    from conadv_lab.methods.forwards import Criterion
    from conadv_lab.models.norm import Branch


@dataclass(frozen=True)
class StaleOptions(StalenessOptions):
    """Options of stale attacks."""

    first: Literal["initial", "clean"] = "initial"
    """What the first τ steps train on: images attacked with the initial weights, or clean images only."""
    placement: Literal["serial", "stream", "ranks"] = "serial"
    """Where conadv's attack runs: before the step, on a parallel CUDA stream, or on ranks that only attack."""
    attackers: int = 0
    """Number of ranks that only attack (with placement ranks)."""

    def check(self) -> None:
        super().check()
        require_count(0, attackers=self.attackers)


class Placement:
    """Where the attack runs and its results are kept. This is the serial placement: on this device, before the step.

    Attributes:
        here: whether all of a step's operators run on this device, so that they can be captured.
    """

    here = True

    def __init__(self) -> None:
        self.slots = Slots(1)

    def begin(self, step: Step, pending: dict[int, list[Any]], staleness: int) -> dict[int, list[Any]]:
        """On the host, before a step: returns what is pending, by step number, where this placement keeps it."""
        if self.slots.count != staleness + 1:
            self.slots = Slots(staleness + 1)
        self.slots.reserve(max(step.size(ahead) for ahead in _ahead(step, staleness)))
        return {
            number: self.slots.adopt(number - step.number, parts) for number, parts in sorted(pending.items())
        }

    def attack(
        self, attack: Attack, model: nn.Module, step: Step, criterion: Criterion, wanted: Sequence[int]
    ) -> dict[int, list[Any]]:
        """For each wanted step number, per micro-batch, what `taken` turns into the perturbation."""
        for number in wanted:
            slot, first = number - step.number, 0
            for batch in step.batches(slot):
                self.slots.write(slot, first, attack.perturb(model, batch, criterion))
                first += len(batch.labels)
        now = step.number
        return {number: self.slots.parts(number - now, step.sizes(number - now)) for number in wanted}

    def taken(self, kept: Any) -> Tensor:
        """One micro-batch's perturbation; waits for it if necessary."""
        return kept

    def move_up(self) -> None:
        """At the end of a step: move the queue up by one."""
        self.slots.move_up()

    def end(self, step: Step, pending: Sequence[int]) -> dict[int, list[Any]]:
        """On the host, after a step: returns what is pending, by step number."""
        now = step.number
        return {n: self.slots.parts(n - now - 1, step.sizes(n - now)) for n in pending if n > now}


def _ahead(step: Step, staleness: int) -> range:
    """The offsets of the upcoming steps to be attacked."""
    return range(min(staleness, step.last - step.number) + 1)


class ConAdv(TwoBranches):
    """Concurrent adversarial learning: train on images attacked with the weights from τ steps ago.

    Liu et al., "Concurrent Adversarial Learning for Large-Batch Training", ICLR 2022, Algorithm 1. Step t first attacks
    the batch of step t + τ with the current weights and running statistics and stores the result; then it trains on
    its clean images and on those attacked at step t − τ. No old weights are stored. A step never waits for its own
    attack, which can run in parallel with training: see `conadv_lab.methods.placement`.

    Args:
        attack: how an image is attacked.
        staleness: τ ≥ 0; 0 is DisAdv.
        weights: loss weights, clean and adversarial; (1, 1) as in Algorithm 1. A step without adversarial images
            gives its clean loss weight 1.
        first: what the first τ steps train on, which the paper does not say: ``"initial"``: images attacked
            with the initial weights; ``"clean"``: clean images only.
        placement: where the attack runs; None: before the step, on the same device. It changes no bit.
    """

    name, label, colour, marker = "conadv", "ConAdv", "#D55E00", "v"
    about = "B clean images and the same images, attacked `--staleness` steps earlier"
    source = "Liu et al., ICLR 2022"
    reads: tuple[type, ...] = (RadiusOptions, AttackOptions, StaleOptions, WeightOptions)
    side: Literal["", "attack", "ascent"] = "attack"
    concurrent = True

    def __init__(
        self,
        attack: Attack,
        staleness: int = 1,
        weights: Weights = (1, 1),
        first: Literal["initial", "clean"] = "initial",
        placement: Placement | None = None,
    ) -> None:
        super().__init__(weights)
        if isinstance(attack, type) or not hasattr(attack, "perturb"):
            raise ValueError(
                f"attack is {attack!r}; allowed: an attack, such as conadv_lab.SignAttack(epsilon={_radius(attack)})"
            )
        require_count(0, staleness=staleness)
        if first not in ("initial", "clean"):
            raise unknown("first", str(first), ["initial", "clean"])
        self.attack, self.staleness, self.first = attack, staleness, first
        self.lookahead, self.side_steps = staleness, attack.steps
        self.placement = placement or Placement()
        self.pending: dict[int, list[Any]] = {}

    @classmethod
    def of(cls, config: Config) -> Method:
        section = config.method
        return cls(attack_of(config), section.staleness, section.weights or (1, 1), section.first)

    def kept_bytes(self, steps: float) -> float:
        return self.attack.kept_bytes * min(self.staleness + 1, steps)

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        criterion = self.checked(model, step, criterion)
        if step.number == 0:  # a new loop: what an earlier one left behind belongs to other images
            self.pending.clear()
        waiting = {number: parts for number, parts in self.pending.items() if number >= step.number}
        self.pending = self.placement.begin(step, waiting, self.staleness)
        return criterion

    def kind(self, step: Step) -> Hashable:
        if not self.placement.here:
            return None
        now = step.number
        slots = self.placement.slots.version
        return tuple(n - now for n in self._wanted(step)), now in self.pending, self._starts_clean(now), slots

    def offsets(self, step: Step) -> Sequence[int]:
        return sorted({0, *(number - step.number for number in self._wanted(step))})

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        with norm.one_update(model):
            if self.staleness == 0 and self.placement.here and step.number not in self.pending:
                return self._trained_at_once(model, step, criterion)
            losses = self._attacked_and_trained(model, step, criterion)
        self.placement.move_up()
        return losses

    def end(self, step: Step) -> None:
        self.pending = self.placement.end(step, sorted({*self.pending, *self._wanted(step)}))

    def attack_ahead(self, model: nn.Module, step: Step, criterion: Criterion) -> None:
        """One step of a rank that only attacks."""
        criterion = self.begin(model, step, criterion)
        self._attack(model, step, criterion)
        self.end(step)

    def passes(self, step: Step) -> int:
        return 1 if self._starts_clean(step.number) else 2

    def _wanted(self, step: Step) -> list[int]:
        """The steps within τ whose batches are not attacked yet: τ + 1 steps at first."""
        ahead = (step.number + offset for offset in _ahead(step, self.staleness))
        return [n for n in ahead if n not in self.pending and not self._starts_clean(n)]

    def _attack(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[int, list[Any]]:
        wanted = self._wanted(step)
        return self.placement.attack(self.attack, model, step, criterion, wanted) if wanted else {}

    def _attacked_and_trained(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        now = step.number
        if now in self._wanted(step):  # attacked in the step that trains on it, which has to wait
            made = self._attack(model, step, criterion)
            return self._trained(model, step, criterion, made[now])
        _, losses = self.lanes.beside(
            lambda: self._attack(model, step, criterion),
            lambda: self._trained(model, step, criterion, self.pending.get(now)),
        )
        return losses

    def _trained_at_once(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        """Without staleness each micro-batch is attacked and trained on before the next, so it is made only once.

        Neither weights nor running statistics change before the step's end, so the attack sees the same values as at
        the start.
        """

        def trained(batch: Batch) -> tuple[Tensor, Tensor]:
            clean, images = self.lanes.beside(
                lambda: self._train_on(model, batch.images, batch, criterion, 0),
                lambda: self.attack.apply(batch, self.attack.perturb(model, batch, criterion)),
            )
            return clean, self._train_on(model, images, batch, criterion, 1)

        return steps.totals(trained(batch) for batch in step.batches())

    def _trained(
        self, model: nn.Module, step: Step, criterion: Criterion, pending: list[Any] | None
    ) -> Losses:
        if pending is None:
            return Losses(steps.train_on_clean(model, step, criterion, weight=1.0, lanes=self.lanes))
        pairs = zip(step.batches(), pending, strict=True)
        return steps.totals(self._train_on_pair(model, *pair, criterion) for pair in pairs)

    def _train_on_pair(
        self, model: nn.Module, batch: Batch, kept: Any, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        def attacked() -> Tensor:
            images = self.attack.apply(batch, self.placement.taken(kept))
            return self._train_on(model, images, batch, criterion, 1)

        clean, adversarial = self.lanes.beside(
            lambda: self._train_on(model, batch.images, batch, criterion, 0), attacked
        )
        return clean, adversarial

    def _train_on(
        self, model: nn.Module, images: Tensor, batch: Batch, criterion: Criterion, which: int
    ) -> Tensor:
        branch: Branch = "adversarial" if which else "main"
        weight = self.weights[which]
        return steps.train_on(model, images, batch, criterion, weight, branch, lanes=self.lanes)

    def _starts_clean(self, number: int) -> bool:
        return self.first == "clean" and number < self.staleness

    def sign_agreement(self, model: nn.Module, step: Step, criterion: Criterion) -> float | None:
        """Fraction of pixels whose pending, stale sign equals a fresh one; a probe, called before `backward`.

        None if there is no pending sign attack for this step. Costs one attack.
        """
        pending = [self.placement.taken(kept) for kept in self.pending.get(step.number, [])]
        if not pending or pending[0].dtype != torch.uint8:
            return None
        self.pending[step.number] = pending
        agreement = 0.0
        for batch, kept in zip(step.batches(), pending, strict=True):
            fresh = signs.unpack(self.attack.perturb(model, batch, criterion), batch.images)
            same = signs.unpack(kept, batch.images) == fresh
            agreement += batch.share * same.float().mean().item()
        return agreement

    def probe(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[str, float]:
        agreement = self.sign_agreement(model, step, criterion)
        return {} if agreement is None else {"sign_agreement": self.gradients.sum(agreement)}

    def state_dict(self) -> dict[str, Any]:
        for number, kept in self.pending.items():
            self.pending[number] = [self.placement.taken(one) for one in kept]
        return {"pending": dict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = dict(state["pending"])


class DisAdv(ConAdv):
    """Distributed adversarial training: attack a batch with the current weights, then train on it. ConAdv with τ = 0.

    >>> from conadv_lab.methods.attack import SignAttack
    >>> DisAdv(SignAttack(1 / 255)).depth
    2
    """

    name, label, colour, marker = "disadv", "DisAdv", "#0072B2", "D"
    about = "B clean images and the same images, attacked with the current weights"
    reads = (RadiusOptions, AttackOptions, WeightOptions)
    concurrent = False

    def __init__(self, attack: Attack, weights: Weights = (1, 1)) -> None:
        super().__init__(attack, staleness=0, weights=weights)

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(attack_of(config), config.method.weights or (1, 1))


def _radius(given: object) -> str:
    """The ε to suggest if a number was passed as the attack."""
    is_radius = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given <= 1
    return f"{given:g}" if is_radius else "1/255"
