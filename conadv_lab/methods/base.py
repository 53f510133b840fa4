"""What a method is: facts that cost no torch, and the one place where methods differ, how a step's gradient is made."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.alone import ALONE, Gradients
from conadv_lab.methods.lanes import Lanes
from conadv_lab.methods.later import norm, steps
from conadv_lab.methods.learning import LOOKS, LearnsBoth
from conadv_lab.mistakes import require

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

    ``adversarial`` is None where there are no two kinds of images: ``clean`` is then the loss of all.
    """

    clean: Tensor
    adversarial: Tensor | None = None


class Method:
    """Base of all methods. ``backward`` adds the gradient of one global step to the parameters' ``.grad``.

    It has three parts, and a method says what it is in the middle one:

    1. `begin`, on the host: checks, and makes what waits between steps where it is not there yet.
    2. `gradient`, on the device: every operator of the step. It may be recorded once and replayed for all later steps
       of the same `kind`, without Python. So it reads no value back (``.item()``, ``bool(tensor)``), makes no tensor
       from a Python number that changes, and knows the time by ``step`` alone, in so far as `kind` tells it.
    3. `end`, on the host: counters, after a step that did not fail.

    What waits for a later step lies in tensors that are made once and changed in place with ``copy_``: a queue of τ
    steps is τ + 1 tensors that move up by one. Where one has to be made anew, because more images come than ever
    before, `kind` must change for good, for example by naming the tensor's size.

    A forward in training mode moves the running statistics. One that must not, as the second of a sharpness-aware
    step, is made with ``counted=False``: see `steps.train_on` and `conadv_lab.models.norm.branch_of`.

    The attributes are all that is known of a method elsewhere: config, help, plans, the simulator, memory and figures
    take them from here, cost and depth among them. Those up to ``reads`` are of the class; an instance may decide
    the others.

    Attributes:
        name: what ``--method`` calls it; empty for a base, and for a method of a user's own, called by its file.
        label, colour, marker: in figures.
        about: what a step trains on, in a few words.
        source: whose it is, paper and year.
        reads: dataclasses whose fields are the options of the config that it reads.
        clean_fraction: clean images that a step trains on over the global batch B: 1, or ½ for equal-cost forms.
        altered_fraction: altered images of a step over B.
        replays: how many steps in a row train on the same images.
        together: whether clean and altered images share a forward and a backward.
        side: what has to be computed besides the training: an ``attack`` has no weight gradients, an ``ascent`` has.
        side_steps: how often, one after another; on average, where steps differ. side_share: on which share of B.
        repeats: how many whole trainings, over clean and altered images, come before the last one, as an ascent of its
            own loss takes.
        concurrent: whether the side may run beside the step, or on ranks of its own, once it is stale.
        staleness: τ, how many steps old the weights are that altered images or an ascent were made with.
        lookahead: how many steps ahead the stream must let it see.
        two_branches: whether batch norm needs its adversarial branch.
        left_out: how many steps were, as a pass of theirs was not finite.
        copies: tensors as large as all weights that are held beside weights, gradients and optimizer state.
        lanes: how passes run that need not wait for one another; whoever captures a step puts streams in its place.
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
        """The method that a config asks for; randomness is derived from the run's seed."""
        return cls()

    @classmethod
    def filled(cls, config: Config) -> dict[str, Any]:
        """The method's own values of options that the config leaves at None."""
        return {}

    @property
    def new_fraction(self) -> float:
        """Images that a step takes from the stream over B; the clean ones, as altered images are made of those."""
        return self.clean_fraction

    @property
    def single_step(self) -> bool:
        """Whether images are attacked by one step, where training may overfit to the attack (Wong et al. 2020)."""
        return bool(self.side) and self.side_steps == 1 and self.altered_fraction > 0

    def check(self, config: Config) -> None:
        """Raise ``ValueError`` where the config's other parts do not suit the method."""

    def require_cut(self, images: int) -> None:
        """Raise ``ValueError`` where a micro-batch of so many images of the stream does not suit the method."""

    def attach(self, optimizer: Optimizer | None, gradients: Gradients = ALONE) -> None:
        """Tell the method, before the first step, of the optimizer and of who else makes the gradients."""
        self.optimizer, self.gradients = optimizer, gradients

    @cached_property
    def gradient_evaluations(self) -> float:
        """Passes (forward, input gradient, weight gradient) / 3, per image of B.

        >>> Vanilla().gradient_evaluations
        1.0
        """
        thirds = {"": 0, "attack": 2, "ascent": 3}[self.side] * self.side_steps * self.side_share
        return (3 * (1 + self.repeats) * (self.clean_fraction + self.altered_fraction) + thirds) / 3

    @cached_property
    def depth(self) -> float:
        """Gradient computations of a step that must follow one another; an average where steps differ."""
        beside = self.side_steps if self.side else 0
        stale = (self.concurrent or self.repeats) and self.staleness
        return (max(1, beside) if stale else 1 + beside) + self.repeats

    def step_cost(self, number: int, steps: int) -> tuple[float, float]:
        """(gradient evaluations, depth) of step ``number`` of a run of so many steps."""
        return self.gradient_evaluations, self.depth

    @property
    def rereads(self) -> bool:
        """Whether images of a step are wanted more than once."""
        return bool(self.side) or self.altered_fraction > 0

    def kept_bytes(self, steps: float) -> float:
        """Bytes a pixel value and image of what waits for its step, in a run of so many steps."""
        return 0.0

    def backward(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        """Add the step's gradient to the parameters' ``.grad``; returns its mean losses.

        Args:
            model: of images, which stay as they are, whatever its forward writes into what it is given.
            step: from `conadv_lab.lookahead` or a `Stream`.
            criterion: (outputs, labels) to their mean loss. Where the model returns more than a tensor, a criterion
                that takes it gets all of it, any other the ``logits``, ``out`` or first part.
        """
        criterion = self.begin(model, step, criterion)
        losses = self.gradient(model, step, criterion)
        self.end(step)
        return losses

    def begin(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        """What the host does before a step's `gradient`; returns the criterion that it is given."""
        return self.checked(model, step, criterion)

    def gradient(self, model: nn.Module, step: Step, criterion: Criterion) -> Losses:
        """The step's operators: its gradient, added to ``.grad``, and its mean losses."""
        raise NotImplementedError

    def end(self, step: Step) -> None:
        """What the host notes after a step's `gradient`."""

    def kind(self, step: Step) -> Hashable | None:
        """All that decides, on the host, which operators the step's `gradient` runs; asked after `begin`.

        Steps of one kind run the same operators on tensors at the same places. Sizes of batches need not be named, nor
        whether the adversarial statistics are warm: whoever captures adds them. None, which is what a method says
        that is not told otherwise, means "not known": every step runs operator by operator.
        """
        return None

    def offsets(self, step: Step) -> Sequence[int]:
        """Which batches `gradient` asks for with ``step.batches(offset)``; by default all that the stream has."""
        return range(-1 if step.number else 0, min(step.ahead, step.last - step.number) + 1)

    def passes(self, step: Step) -> int:
        """How many calls of ``.backward()`` reach the weights for each of the step's micro-batches, 0 if not known.

        Ranks send a gradient while the step's last backward goes on; where the last is not known, after it. Gradients
        that `torch.autograd.grad` returns, as those of an ascent, are nobody's ``.grad`` and do not count.
        """
        return 0

    def probe(self, model: nn.Module, step: Step, criterion: Criterion) -> dict[str, float]:
        """Figures of how stale the step's attack or ascent is, by name; called before `backward`, changes nothing.

        They are the same on all ranks. Empty where nothing is stale.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, tensors and plain values only, under any of these names:

        - ``pending``: one tensor a micro-batch, a list for those of the step before, or a dict with one for each step
          to come. Over ranks it is gathered by global groups, so a checkpoint depends on no number of ranks.
        - ``shared``: what is the same on all ranks, such as one tensor a parameter. The first rank's is kept.
        - ``own``: each rank's own, of the same shapes on all, such as the last gradient of its own images. A run goes
          on with as many ranks as it was saved with.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, into tensors of the method's own."""

    def checked(self, model: nn.Module, step: Step, criterion: Criterion) -> Criterion:
        """The criterion, which is judged at its first use.

        Raises:
            ValueError: model, optimizer or steps are not what the method needs.
        """
        if self.two_branches:
            self._check_branches(model)
        if step.ahead < self.lookahead:
            raise ValueError(
                f"the steps look {step.ahead} ahead; {type(self).__name__} needs lookahead(…, ahead={self.lookahead})"
            )
        if step.replays != self.replays:
            raise ValueError(
                f"the steps show each batch {step.replays} times; {type(self).__name__} needs "
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
    """Of an attack or ascent that its step does not wait for."""

    staleness: int | None = None
    """τ: how many steps old the weights are that a batch is attacked with, or the ascent gradient is taken at; None: 1,
    of advprop and fgsm-rs 0."""

    def check(self) -> None:
        fine = self.staleness is None or self.staleness >= 0
        require(fine, "staleness", self.staleness, "a whole number of at least 0")


@dataclass(frozen=True)
class WeightOptions:
    """Of methods that train on two kinds of images."""

    weights: tuple[float, float] | None = None
    """Weights of clean and adversarial loss; None: (0.5, 0.5) for sgd and equal-cost forms, else (1, 1)."""

    def check(self) -> None:
        if self.weights is not None and (min(self.weights) < 0 or sum(self.weights) == 0):
            raise ValueError(f"weights are {self.weights}; allowed: two numbers of at least 0, not both 0")


class TwoBranches(Method):
    """Base of the methods that train on clean and altered images: loss = w₁ · mean(clean) + w₂ · mean(altered).

    Args:
        weights: None is (1, 1), or (½, ½) at equal cost.
        equal_cost: of a global batch B, half are new clean images and half are the step before's, altered: a step
            costs what a vanilla step costs.
    """

    altered_fraction = 1.0
    two_branches = True

    def __init__(self, weights: Weights | None, equal_cost: bool = False) -> None:
        if equal_cost:
            self.clean_fraction = self.altered_fraction = 0.5
            self.together = True
        if weights is None:
            weights = (0.5, 0.5) if equal_cost else (1, 1)
        fine = len(weights) == 2 and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
        require(fine and sum(weights) > 0, "weights", weights, "two numbers of at least 0, not both 0")
        self.weights = weights
