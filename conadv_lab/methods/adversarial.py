"""ConAdv and its relatives: clean images through the main branch, altered ones through the adversarial branch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conadv_lab.data.hashing import image_keys, signs
from conadv_lab.data.loader import Batch, Step
from conadv_lab.methods.attack import Attack
from conadv_lab.methods.base import (
    Criterion,
    Losses,
    MeanCheck,
    Method,
    total,
    totals,
    train_on,
    train_on_both,
    train_on_clean,
)
from conadv_lab.methods.kept import Kept
from conadv_lab.methods.learning import LOOKS, LearnsBoth
from conadv_lab.methods.placement import Placement
from conadv_lab.methods.signs import pack, unpack
from conadv_lab.mistakes import require, unknown
from conadv_lab.models.norm import branch_parameters, has_batch_norm, one_update

Weights = tuple[float, float]
HALVES: Weights = (0.5, 0.5)


class TwoBranches(Method):
    """Base of the methods that train on clean and altered images: loss = w₁ · mean(clean) + w₂ · mean(altered)."""

    def __init__(self, weights: Weights) -> None:
        fine = len(weights) == 2 and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
        require(fine and sum(weights) > 0, "weights", weights, "two numbers of at least 0, not both 0")
        self.weights = weights
        self._check = MeanCheck()
        self._checked_model: nn.Module | None = None
        self._learns = LearnsBoth([])

    def _checked(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        if model is not self._checked_model:
            if has_batch_norm(model):
                raise ValueError(
                    "the model has batch norm without an adversarial branch; "
                    "convert it first: model = conadv_lab.mixture_batch_norm(model)"
                )
            self._checked_model = model
            self._learns = LearnsBoth(branch_parameters(model), looks=LOOKS if self.weights[0] else 0)
        else:
            self._learns.check()
        if step.ahead < self.lookahead:
            raise ValueError(
                f"the steps look {step.ahead} ahead; {type(self).__name__} needs lookahead(…, ahead={self.lookahead})"
            )
        return self._check(criterion)


class ConAdv(TwoBranches):
    """Concurrent adversarial learning: train on images that were attacked with the weights of τ steps ago.

    Liu et al., "Concurrent Adversarial Learning for Large-Batch Training", ICLR 2022, Algorithm 1. At step t the
    batch of step t + τ is attacked first, with weights and running statistics as they are, and kept; then the
    step trains on its clean images and on those attacked at step t − τ. No old weights are stored. Nothing in a
    step waits for its own attack, so that it can run beside the training: see `conadv_lab.methods.placement`.

    Args:
        attack: how an image is attacked.
        staleness: τ ≥ 0; 0 is DisAdv.
        weights: of the clean and the adversarial mean loss; (1, 1) as in Algorithm 1. A step without
            adversarial images weighs its clean loss 1.
        first: what the first τ steps train on, which the paper does not say: ``"initial"`` is images attacked
            with the initial weights, ``"clean"`` is clean images alone.
        placement: where the attack runs; None is before the step, on the same device. It changes no bit.
    """

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
        require(
            isinstance(staleness, int) and staleness >= 0,
            "staleness",
            staleness,
            "a whole number of at least 0",
        )
        if first not in ("initial", "clean"):
            raise unknown("first", str(first), ["initial", "clean"])
        self.attack, self.staleness, self.first = attack, staleness, first
        self.lookahead = staleness
        self.gradient_evaluations = (6 + 2 * attack.steps) / 3
        self.depth = max(1, attack.steps) if staleness else 1 + attack.steps
        self.placement = placement or Placement()
        self.pending: dict[int, list[Any]] = {}

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        criterion = self.attack_ahead(model, step, criterion)
        with one_update(model):
            losses = self._trained(model, step, criterion, self.pending.get(step.number))
            self.placement.join()
        self.pending.pop(step.number, None)
        return losses

    def attack_ahead(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        """Begin to attack what will be trained on within τ steps and is not attacked yet: τ + 1 batches at first."""
        criterion = self._checked(model, step, criterion)
        if step.number == 0:  # another loop: what an earlier one left behind belongs to other images
            self.pending.clear()
        for left_out in [n for n in self.pending if n < step.number]:
            del self.pending[left_out]
        ahead = range(step.number, min(step.number + self.staleness, step.last) + 1)
        wanted = [n for n in ahead if n not in self.pending and not self._starts_clean(n)]
        if wanted:
            self.pending |= self.placement.attack(self.attack, model, step, criterion, wanted)
        return criterion

    def passes(self, step: Step) -> int:
        return 1 if self._starts_clean(step.number) else 2

    def _trained(
        self, model: nn.Module, step: Step, criterion: Criterion, pending: list[Any] | None
    ) -> Losses:
        if pending is None:
            return Losses(train_on_clean(model, step, criterion, weight=1.0))
        pairs = zip(step.batches(), pending, strict=True)
        return totals(self._train_on_pair(model, *pair, criterion) for pair in pairs)

    def _train_on_pair(
        self, model: nn.Module, batch: Batch, kept: Any, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        clean = train_on(model, batch.images, batch, criterion, self.weights[0], "main")
        images = self.attack.apply(batch, self.placement.taken(kept))
        return clean, train_on(model, images, batch, criterion, self.weights[1], "adversarial")

    def _starts_clean(self, number: int) -> bool:
        return self.first == "clean" and number < self.staleness

    def sign_agreement(self, model: nn.Module, step: Step, criterion: Criterion) -> float | None:
        """Share of pixels where the pending, stale sign equals a fresh one; a probe, called before `backward`.

        None where there is no pending sign attack for this step. Costs one attack.
        """
        pending = [self.placement.taken(kept) for kept in self.pending.get(step.number, [])]
        if not pending or pending[0].dtype != torch.uint8:
            return None
        self.pending[step.number] = pending
        agreement = 0.0
        for batch, kept in zip(step.batches(), pending, strict=True):
            fresh = unpack(self.attack.perturb(model, batch, criterion), batch.images)
            same = unpack(kept, batch.images) == fresh
            agreement += batch.share * same.float().mean().item()
        return agreement

    def state_dict(self) -> dict[str, Any]:
        for number, kept in self.pending.items():
            self.pending[number] = [self.placement.taken(one) for one in kept]
        return {"pending": dict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = dict(state["pending"])


class DisAdv(ConAdv):
    """Distributed adversarial training: attack a batch with today's weights, then train on it. ConAdv with τ = 0.

    >>> from conadv_lab.methods.attack import SignAttack
    >>> DisAdv(SignAttack(1 / 255)).depth
    2
    """

    def __init__(self, attack: Attack, weights: Weights = (1, 1)) -> None:
        super().__init__(attack, staleness=0, weights=weights)


class Recycled(TwoBranches):
    """Recycled ConAdv: the clean backward of step t also gives ∇ₓL; step t + 1 trains on x_t moved along its sign.

    Ours, not the paper's. Staleness 1 and depth 1 without an attack pass: x̂ = clip[0,1](x + ε · sign(∇ₓL)), the
    gradient through the main branch as it trains. The first step trains on clean images alone, with weight 1.

    Args:
        epsilon: length of the move, in image units.
        equal_cost: of a global batch B, half are new clean images and half are the step before's, moved; each
            half has weight ½, and a step costs what a vanilla step costs.
        weights: of the clean and the adversarial mean loss; None is (1, 1), or (½, ½) at equal cost.
    """

    def __init__(self, epsilon: float, equal_cost: bool = False, weights: Weights | None = None) -> None:
        super().__init__(_weights(weights, equal_cost))
        require(isinstance(epsilon, (int, float)) and 0 <= epsilon <= 1, "epsilon", epsilon, "0 to 1")
        require(
            self.weights[0] > 0, "weights", weights, "a clean weight above 0, as its gradient is recycled"
        )
        self.epsilon, self.equal_cost = epsilon, equal_cost
        self.clean_fraction, self.gradient_evaluations = _cost(equal_cost)
        self.pending: list[Tensor] = []
        # The step that they were made in; None after loading, where it is the step before the one to come.
        self._made_in: int | None = None

    def passes(self, step: Step) -> int:
        return 2 if self._is_pending(step) and not self.equal_cost else 1

    def _is_pending(self, step: Step) -> bool:
        """Whether there are signs of the step before; not where it was left out, failed or is of another loop."""
        return bool(self.pending) and step.number > 0 and self._made_in in (None, step.number - 1)

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        criterion = self._checked(model, step, criterion)
        kept = Kept(step.size())
        with one_update(model):
            losses = self._trained(model, step, criterion, kept)
        self.pending, self._made_in = kept.parts(), step.number
        return losses

    def _trained(self, model: nn.Module, step: Step, criterion: Criterion, kept: Kept) -> Losses:
        if not self._is_pending(step):
            return Losses(self._train_on_clean(model, step, criterion, 1.0, kept))
        moved = self._moved(step, self.pending)
        if self.equal_cost:
            pairs = zip(step.batches(), moved, strict=False)
            return totals(self._train_on_both(model, *pair, criterion, kept) for pair in pairs)
        return Losses(
            self._train_on_clean(model, step, criterion, self.weights[0], kept),
            total(train_on(model, b.images, b, criterion, self.weights[1], "adversarial") for b in moved),
        )

    def _train_on_clean(
        self, model: nn.Module, step: Step, criterion: Criterion, weight: float, kept: Kept
    ) -> Tensor:
        def trained(batch: Batch) -> Tensor:
            images = batch.images.detach().requires_grad_()
            loss = train_on(model, images, batch, criterion, weight, "main")
            kept.add(_signs(images))
            return loss

        return total(trained(batch) for batch in step.batches())

    def _train_on_both(
        self, model: nn.Module, clean: Batch, moved: Batch, criterion: Criterion, kept: Kept
    ) -> tuple[Tensor, Tensor]:
        images = clean.images.detach().requires_grad_()
        moved = replace(moved, share=clean.share)
        losses = train_on_both(model, replace(clean, images=images), moved, criterion, self.weights)
        kept.add(_signs(images))
        return losses

    def _moved(self, step: Step, pending: list[Tensor]) -> Iterator[Batch]:
        """The step before's images, moved. An equal-cost step 1 uses the leading half of the longer step 0."""
        for batch, kept in zip(step.batches(-1), pending, strict=True):
            images = unpack(kept, batch.images).mul_(self.epsilon).add_(batch.images).clamp_(0, 1)
            yield replace(batch, images=images)

    def state_dict(self) -> dict[str, Any]:
        return {"pending": list(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending, self._made_in = list(state["pending"]), None


class _Control(TwoBranches):
    """A control: as its rival, but the altered images come from no gradient.

    Paired, a step trains on its own images and their altered form, as ConAdv does. At equal cost it trains on
    B/2 new images and on the step before's, altered, as recycled ConAdv does.
    """

    def __init__(self, equal_cost: bool, weights: Weights | None) -> None:
        super().__init__(_weights(weights, equal_cost))
        self.equal_cost = equal_cost
        self.clean_fraction, self.gradient_evaluations = _cost(equal_cost)

    def alter(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def passes(self, step: Step) -> int:
        return 1 if self.equal_cost else 2

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        criterion = self._checked(model, step, criterion)
        with one_update(model):
            if not self.equal_cost:
                return totals(self._train_on_pair(model, batch, criterion) for batch in step.batches())
            if step.number == 0:
                return Losses(train_on_clean(model, step, criterion, weight=1.0))
            pairs = zip(step.batches(), step.batches(-1), strict=False)
            return totals(
                train_on_both(model, own, self._altered(other, own.share), criterion, self.weights)
                for own, other in pairs
            )

    def _train_on_pair(self, model: nn.Module, batch: Batch, criterion: Criterion) -> tuple[Tensor, Tensor]:
        clean = train_on(model, batch.images, batch, criterion, self.weights[0], "main")
        images = self.alter(batch)
        return clean, train_on(model, images, batch, criterion, self.weights[1], "adversarial")

    def _altered(self, batch: Batch, share: float) -> Batch:
        return replace(batch, images=self.alter(batch), share=share)


class Noise(_Control):
    """Control: random signs of length ε in place of the attack, fixed by (seed, epoch, image)."""

    def __init__(
        self, epsilon: float, equal_cost: bool = False, weights: Weights | None = None, seed: int = 0
    ) -> None:
        super().__init__(equal_cost, weights)
        require(isinstance(epsilon, (int, float)) and 0 <= epsilon <= 1, "epsilon", epsilon, "0 to 1")
        self.epsilon, self.seed = epsilon, seed

    def alter(self, batch: Batch) -> Tensor:
        keys = image_keys(self.seed, "noise", batch.epochs, batch.indices)
        noise = signs(keys, batch.images[0].numel()).view(batch.images.shape)
        return noise.to(batch.images.dtype).mul_(self.epsilon).add_(batch.images).clamp_(0, 1)


class Copy(_Control):
    """Control: the same images once more, unchanged, through the adversarial branch."""

    def __init__(self, equal_cost: bool = False, weights: Weights | None = None) -> None:
        super().__init__(equal_cost, weights)

    def alter(self, batch: Batch) -> Tensor:
        return batch.images


def _radius(given: object) -> str:
    """The ε that was meant where a number was given for an attack."""
    is_radius = isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given <= 1
    return f"{given:g}" if is_radius else "1/255"


def _weights(weights: Weights | None, equal_cost: bool) -> Weights:
    return weights if weights is not None else HALVES if equal_cost else (1, 1)


def _signs(images: Tensor) -> Tensor:
    assert images.grad is not None
    return pack(images.grad)


def _cost(equal_cost: bool) -> tuple[float, float]:
    """(clean fraction, gradient evaluations) of a method with two training passes and no attack pass."""
    return (0.5, 1.0) if equal_cost else (1.0, 2.0)
