"""What a method is: facts available without torch, and the one place where methods differ: a step's gradient."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.alone import ALONE, Gradients
from conadv_lab.methods.lanes import Lanes
from conadv_lab.methods.later import norm, steps
from conadv_lab.methods.learning import LOOKS, LearnsBoth
from conadv_lab.mistakes import require, require_count

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.forwards import Criterion

Weights = tuple[float, float]


@dataclass(frozen=True)
class Losses:
    """Mean losses of a step, detached and on the device.

    ``adversarial`` is None if there is only one kind of images: ``clean`` is then the loss of all.
    """

    clean: Tensor
    adversarial: Tensor | None = None


class Method:
    """Base of all methods. ``backward`` adds the gradient of one global step to the parameters' ``.grad``.

    It has three parts; subclasses implement the second one:

    1. `begin`, on the host: checks, and allocates state that is carried between steps.
    2. `gradient`, on the device: all operators of the step. It may be recorded once and replayed for all later steps
       of the same `kind`, without running Python. So it must not read values back (``.item()``, ``bool(tensor)``) or
       create tensors from changing Python numbers, and may depend on ``step`` only as far as `kind` reflects it.
    3. `end`, on the host: counters, after a step that did not fail.

    State for later steps lives in tensors that are allocated once and updated in place with ``copy_``: a queue of τ
    steps is τ + 1 tensors that move up by one. If one must be reallocated, because a batch is larger than ever before,
    `kind` must change permanently, for example by including the tensor's size.

    A forward pass in training mode updates the running statistics. One that must not, such as the second pass of a
    sharpness-aware step, uses ``counted=False``: see `steps.train_on` and `conadv_lab.models.norm.branch_of`.

    The rest of the package knows a method only by its attributes: config, help, plans, simulator, memory and figures
    read them, including cost and depth. Attributes up to ``reads`` belong to the class; an instance may set the others.

    Attributes:
        name: its name for ``--method``; empty for base classes and for a user's method, which is named by its file.
        label: legend entry in figures.
        colour: matplotlib colour in figures.
        marker: matplotlib marker in figures.
        about: what a step trains on, in a few words.
        source: authors, venue and year.
        reads: dataclasses whose fields are the config options that it reads.
        clean_fraction: clean images that a step trains on over the global batch B: 1, or ½ for equal-cost forms.
        altered_fraction: altered images of a step over B.
        replays: how many consecutive steps train on the same images.
        together: whether clean and altered images share a forward and a backward pass.
        side: computation besides training: an ``attack`` (no parameter gradients) or an ``ascent`` (with them).
        side_steps: how many of them in sequence; the mean, if steps differ.
        side_share: fraction of B that the side computation runs on.
        repeats: how many full training passes, over clean and altered images, precede the last one, as in an ascent
            of the method's own loss.
        concurrent: whether the side computation may run beside the step, or on its own ranks, once it is stale.
        staleness: τ, the age in steps of the weights that altered images or an ascent were computed with.
        lookahead: how many steps ahead the stream must look.
        two_branches: whether batch norm needs its adversarial branch.
        left_out: number of steps skipped because a pass was not finite.
        copies: number of copies of all weights held besides weights, gradients and optimizer state.
        lanes: how independent passes run; capturing a step replaces it with CUDA streams.
    """

    name: str = ""
    label: str = ""
    colour: str = "#CC79A7"
    marker: str = "X"
    about: str = ""
    source: str = "ours"
    reads: tuple[type, ...] = ()
    clean_fraction: float = 1.0
    altered_fraction: float = 0.0
    replays: int = 1
    together: bool = False
    side: Literal["", "attack", "ascent"] = ""
    side_steps: float = 1
    side_share: float = 1.0
    repeats: int = 0
    concurrent: bool = False
    staleness: int = 0
    lookahead: int = 0
    two_branches: bool = False
    copies: float = 0
    left_out: int = 0
    optimizer: Optimizer | None = None
    gradients: Gradients = ALONE
    lanes: Lanes = Lanes()
    _mean_check: Any = None
    _learns: Any = None
    _checked_model: nn.Module | None = None

    @classmethod
    def of(cls, config: Config) -> Method:
        """The method specified by a config; randomness is derived from the run's seed."""
        return cls()

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        """The method's values for options that the config leaves at None."""
        return {}

    @classmethod
    def parts(cls, config: Config) -> list[type[Method]]:
        """The classes whose options a run reads."""
        return [cls]

    @property
    def new_fraction(self) -> float:
        """Images that a step takes from the stream over B: the clean ones, as altered images are made from those."""
        return self.clean_fraction

    @property
    def single_step(self) -> bool:
        """Whether it uses a single-step attack, to which training may overfit catastrophically (Wong et al. 2020)."""
        return bool(self.side) and self.side_steps == 1 and self.altered_fraction > 0

    def check(self, config: Config) -> None:
        """Raise ``ValueError`` if the rest of the config does not suit the method."""

    def require_cut(self, images: int) -> None:
        """Raise ``ValueError`` if a micro-batch with this many images from the stream does not suit the method."""

    def attach(self, optimizer: Optimizer | None, gradients: Gradients = ALONE) -> None:
        """Give the method, before the first step, the optimizer and its access to gradients of other ranks."""
        self.optimizer, self.gradients = optimizer, gradients

    @cached_property
    def gradient_evaluations(self) -> float:
        """(Forward, input-gradient and weight-gradient passes) / 3, per image of B.

        >>> Vanilla().gradient_evaluations
        1.0
        """
        thirds = {"": 0, "attack": 2, "ascent": 3}[self.side] * self.side_steps * self.side_share
        return (3 * (1 + self.repeats) * (self.clean_fraction + self.altered_fraction) + thirds) / 3

    @cached_property
    def depth(self) -> float:
        """Number of gradient computations of a step that must run in sequence; the mean, if steps differ."""
        beside = self.side_steps if self.side else 0
        stale = (self.concurrent or self.repeats) and self.staleness
        return (max(1, beside) if stale else 1 + beside) + self.repeats

    def step_cost(self, number: int, steps: int) -> tuple[float, float]:
        """(gradient evaluations, depth) of step ``number`` of a run of ``steps`` steps."""
        return self.gradient_evaluations, self.depth

    @property
    def rereads(self) -> bool:
        """Whether a step's images are needed more than once."""
        return bool(self.side) or self.altered_fraction > 0

    def kept_bytes(self, steps: float) -> float:
        """Bytes stored per pixel value and image for later steps, in a run of ``steps`` steps."""
        return 0.0

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        """Add the step's gradient to the parameters' ``.grad``; returns its mean losses.

        Args:
            model: takes images, which are not changed even if its forward pass works in place.
            step: from `conadv_lab.lookahead` or a `Stream`.
            criterion: (outputs, labels) to their mean loss. If the model returns more than a tensor, a criterion
                that accepts it gets the whole output, any other the ``logits``, ``out`` or first element.
        """
        criterion = self.begin(model, step, criterion)
        losses = self.gradient(model, step, criterion)
        self.end(step)
        return losses

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        """The host's part before a step's `gradient`; returns the criterion to pass to it."""
        return self.checked(model, step, criterion)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        """The step's operators: adds its gradient to ``.grad`` and returns its mean losses."""
        raise NotImplementedError

    def end(self, step: Step) -> None:
        """The host's part after a step's `gradient`."""

    def kind(self, step: Step) -> Hashable | None:
        """Everything on the host that decides which operators the step's `gradient` runs; called after `begin`.

        Steps of one kind run the same operators on the same tensors. It need not include batch sizes, nor whether the
        adversarial statistics are warmed up: the capture adds these. None, the default, means "unknown": every step
        then runs operator by operator.
        """
        return None

    def offsets(self, step: Step) -> Sequence[int]:
        """The offsets for which `gradient` calls ``step.batches(offset)``; by default all that the stream offers."""
        return range(-1 if step.number else 0, min(step.ahead, step.last - step.number) + 1)

    def passes(self, step: Step) -> int:
        """How many calls of ``.backward()`` per micro-batch reach the parameters; 0: unknown.

        Ranks send gradients during the step's last backward pass or, if that is unknown, after it. Gradients from
        `torch.autograd.grad`, such as those of an ascent, do not go to ``.grad`` and do not count.
        """
        return 0

    def probe(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[str, float]:
        """Metrics of how stale the step's attack or ascent is, by name; called before `backward`, changes nothing.

        Equal on all ranks. Empty if nothing is stale.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights; tensors and plain values only, under any of these names:

        - ``pending``: one tensor per micro-batch: a list for the previous step, or a dict with a list per upcoming
          step. It is gathered over ranks by global groups, so a checkpoint does not depend on the number of ranks.
        - ``shared``: state that is equal on all ranks, such as one tensor per parameter. The first rank's is saved.
        - ``own``: per-rank state with equal shapes on all ranks, such as the last gradient of its own images. A run
          must resume with the number of ranks that it was saved with.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`, copying into the method's own tensors."""

    def checked(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        """The criterion, wrapped to be checked at its first use.

        Raises:
            ValueError: model, optimizer or steps do not suit the method.
        """
        if not hasattr(step, "ahead"):
            raise ValueError(
                f"step is of type {type(step).__name__}; allowed: what iterating over lookahead(loader, …) gives"
            )
        if isinstance(criterion, type) or not callable(criterion):
            told = f"the class {criterion.__name__}" if isinstance(criterion, type) else repr(criterion)
            raise ValueError(
                f"the criterion is {told}; allowed: an object, such as torch.nn.CrossEntropyLoss()"
            )
        if self.two_branches:
            self._check_branches(model)
        if step.ahead < self.lookahead:
            raise ValueError(
                f"the steps look {step.ahead} ahead; {type(self).__name__} needs lookahead(…, ahead={self.lookahead})"
            )
        if step.replays != self.replays:
            raise ValueError(
                f"the steps replay each batch {step.replays} times; {type(self).__name__} needs "
                f"lookahead(…, replays={self.replays})"
            )
        if self._mean_check is None:
            self._mean_check = steps.MeanCheck()
        return self._mean_check(criterion)

    def _check_branches(self, model: nn.Module) -> None:
        if model is self._checked_model:
            self._learns.check()
            return
        if norm.has_batch_norm(model):
            raise ValueError(
                "the model has batch norm without an adversarial branch; "
                "convert it first: model = conadv_lab.mixture_batch_norm(model)"
            )
        looks = LOOKS if getattr(self, "weights", (1, 1))[0] else 0
        self._learns = LearnsBoth(norm.branch_parameters(model), looks)
        self._checked_model = model


class Vanilla(Method):
    """Mini-batch gradient descent: the mean loss of the clean images."""

    name, label, colour, marker = "vanilla", "vanilla", "#000000", "o"
    about = "B clean images"
    source = "Robbins and Monro, 1951"

    def passes(self, step: Step) -> int:
        return 1

    def kind(self, step: Step) -> Hashable:
        return "clean"

    def offsets(self, step: Step) -> Sequence[int]:
        return (0,)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        with norm.one_update(model):
            return Losses(steps.train_on_clean(model, step, criterion, weight=1.0, lanes=self.lanes))


@dataclass(frozen=True)
class StalenessOptions:
    """Options of stale attacks and ascents."""

    staleness: int | None = None
    """τ: age in steps of the weights used for the attack or ascent; None: 1, for advprop and fgsm-rs 0."""

    def check(self) -> None:
        if self.staleness is not None:
            require_count(0, staleness=self.staleness)


@dataclass(frozen=True)
class WeightOptions:
    """Options of methods that train on two kinds of images."""

    weights: tuple[float, float] | None = None
    """Loss weights, clean and adversarial; None: (0.5, 0.5) for sgd and equal-cost forms, else (1, 1)."""

    def check(self) -> None:
        if self.weights is not None and (min(self.weights) < 0 or sum(self.weights) == 0):
            raise ValueError(f"weights are {self.weights}; allowed: two numbers of at least 0, not both 0")


class TwoBranches(Method):
    """Base of methods that train on clean and altered images: loss = w₁ · mean(clean) + w₂ · mean(altered).

    Args:
        weights: loss weights (w₁, w₂); None: (1, 1), or (½, ½) at equal cost.
        equal_cost: half of a global batch B are new clean images, the other half are the previous batch's, altered:
            a step costs as much as a vanilla step.
    """

    altered_fraction = 1.0
    two_branches = True

    def __init__(self, weights: Weights | None, equal_cost: bool = False) -> None:
        if equal_cost:
            self.clean_fraction = self.altered_fraction = 0.5
            self.together = True
        if weights is None:
            weights = (0.5, 0.5) if equal_cost else (1, 1)
        pair = isinstance(weights, (tuple, list)) and len(weights) == 2
        fine = pair and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
        require(fine and sum(weights) > 0, "weights", weights, "two numbers of at least 0, not both 0")
        self.weights = weights
