"""One training step: gradient, update and weight average as one unit, run operator by operator or replayed."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab.capture.choice import refused
from conadv_lab.capture.replays import Backend, CannotCapture, Replays
from conadv_lab.data.loader import Step
from conadv_lab.methods.attack import WARM_UPDATES
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.forwards import Criterion
from conadv_lab.methods.lanes import Beside, Lanes
from conadv_lab.models import norm
from conadv_lab.optim.rates import bind, settings


class Follows(Protocol):
    """An average of the weights."""

    def follow(self, model: nn.Module, begun: bool) -> None:
        """Update it with the current weights, or start with them; operators only."""

    def count(self) -> None:
        """Count the update, on the host."""

    @property
    def begun(self) -> bool: ...


class Program:
    """A step's work on the device: the method's gradient, the optimizer's update, the weight average.

    Args:
        model: owns the parameters and batch norms; network: what is called, the model or a wrapper of it.
        average: the weight average, or None.
        rates: one tensor per parameter group, from which the optimizer reads its learning rate; empty if it uses its
            own, as on a CPU.
        backend: captures steps, or None.
        required: whether failing to capture a step is an error.
        told: called with a sentence if steps are not captured.

    Attributes:
        gave_up: whether steps were to be captured, but cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        method: Method,
        optimizer: Optimizer,
        criterion: Criterion,
        *,
        average: Follows | None = None,
        rates: Sequence[Tensor] = (),
        backend: Backend | None = None,
        required: bool = False,
        told: Callable[[str], Any] = print,
    ) -> None:
        self.model, self.network, self.method, self.optimizer = model, network, method, optimizer
        self.criterion, self.average, self.required, self.told = criterion, average, required, told
        self.rates = rates
        # Listed once: walking the module tree in every step would cost the host 0.7 ms.
        self.modules = list(network.modules())
        self.replays, self.gave_up = Replays(backend), False
        if backend is not None:  # loading a state replaces its tensors
            optimizer.register_load_state_dict_post_hook(lambda _: self.forget())

    @property
    def captures(self) -> bool:
        return self.replays.backend is not None

    def __call__(
        self,
        step: Step,
        reduced: Callable[[Callable[[], Losses]], Losses] | None = None,
        noted: Callable[[Losses], Any] | None = None,
    ) -> Losses:
        """Take a step; returns its mean losses, valid until the next step.

        Args:
            step: its batches must have the same addresses in every step of its kind.
            reduced: wraps the gradient function and sums ``.grad`` over ranks, by `conadv_lab.outside.outside`.
            noted: called with the losses before the optimizer's step; such a step is not captured.

        Raises:
            ValueError: it cannot be captured, but must be.
        """
        if self.rates:
            bind(self.optimizer, self.rates)
        whole = type(self.method).backward is not Method.backward  # then it has to be called as a whole
        criterion = self.criterion if whole else self.method.begin(self.network, step, self.criterion)
        begun = self.average is not None and self.average.begun
        kind = None if whole or noted else self.kind(step)
        if whole and self.captures:
            self.give_up(f"{type(self.method).__name__} overrides backward: see Method.gradient")

        def gradient() -> Losses:
            made = self.method.backward if whole else self.method.gradient
            return made(self.network, step, criterion)

        def part() -> Losses:
            losses = reduced(gradient) if reduced else gradient()
            if noted is not None:
                noted(losses)
            return self._updated(losses, begun)

        losses = self._run(kind, part)
        if not whole:
            self.method.end(step)
        if self.average is not None:
            self.average.count()
        return losses

    def forget(self) -> None:
        """Capture again, as tensors that a step reads or writes were replaced."""
        self.replays = Replays(self.replays.backend)

    def give_up(self, reason: str) -> None:
        """Capture no more steps, and say why.

        Raises:
            ValueError: they must be captured.
        """
        if self.required:
            raise refused(reason)
        self.replays, self.gave_up = Replays(None), True
        self.told(f"steps are not captured: {reason}")

    def kind(self, step: Step) -> Hashable | None:
        """Everything that decides which operators a step runs; None if unknown."""
        if not self.captures:
            return None
        method = self.method
        known = method.kind(step)
        if known is None:
            self.give_up(f"{type(method).__name__} does not say which operators a step runs: see Method.kind")
            return None
        sizes = tuple((offset, *step.sizes(offset)) for offset in method.offsets(step))
        updates = norm.adversarial_updates(self.model)
        return (
            known,
            sizes,
            step.layout,
            tuple([module.training for module in self.modules]),
            settings(self.optimizer),
            updates is not None and updates >= WARM_UPDATES,
            self.average and self.average.begun,
        )

    def _updated(self, losses: Losses, begun: bool) -> Losses:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.follow(self.model, begun)
        return losses

    def _run(self, kind: Hashable | None, part: Callable[[], Losses]) -> Losses:
        before = norm.adversarial_updates(self.model)

        def counted() -> tuple[Losses, int]:
            losses = part()
            return losses, (norm.adversarial_updates(self.model) or 0) - (before or 0)

        try:
            (losses, updates), ran = self.replays(kind, counted)
        except CannotCapture as error:
            reason = str(error)
        except RuntimeError as error:
            if not (
                self.captures and isinstance(self.method.lanes, Beside) and "use_reentrant" in str(error)
            ):
                raise
            reason = "the model's checkpointing is reentrant; give torch.utils.checkpoint use_reentrant=False"
            self.method.lanes = Lanes()  # whose .backward() reentrant checkpointing needs
        else:
            if not ran and before is not None:
                norm.note_updates(self.model, before + updates)
            return losses
        # After the except block: the error keeps the failed capture's memory alive, and memory may be what was missing.
        self.optimizer.zero_grad()
        norm.note_updates(self.model, before)
        self.give_up(reason)
        return part()
