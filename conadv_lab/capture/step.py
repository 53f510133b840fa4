"""A captured step for your own training loop."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab.capture.choice import Capture, backend_of, hooked, reason_against
from conadv_lab.capture.feed import Copies
from conadv_lab.capture.program import Program
from conadv_lab.capture.replays import Backend
from conadv_lab.data.loader import Batch, Step
from conadv_lab.data.lookahead import images_and_labels
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.forwards import Criterion
from conadv_lab.methods.lanes import Streams
from conadv_lab.optim.momenta import begin_momenta
from conadv_lab.optim.rates import rates_on, take_over

ENDLESS = 1 << 62


class CapturedStep:
    """A whole training step, gradient and update, as one CUDA graph that takes one batch per call; plain code on a CPU.

    The first calls run operator by operator, then each kind of step is captured once and replayed. Learning rates may
    change between calls, by a scheduler or by hand; changing another optimizer setting or the image shape, or freezing
    or unfreezing parameters, makes another kind. A method that looks τ steps ahead trains on the batch from τ calls
    earlier, so the first τ calls return None and `rest` trains on the last τ batches.

    Args:
        model: converted by `conadv_lab.mixture_batch_norm` if the method needs it, in training mode, on its device.
        method: such as ``conadv_lab.ConAdv(…)``; do not share it with another loop.
        optimizer: torch's SGD with ``fused=True``, another torch optimizer with ``capturable=True``, LARS or LAMB. Any
            optimizer on a CPU.
        criterion: (outputs, labels) to their mean loss.
        example: (images, labels), a typical batch; only used for checks.
        capture: "auto" runs operator by operator if it cannot capture, and prints why to stderr; "on" raises instead;
            "off" never captures.

    Raises:
        ValueError: "on", but the step cannot be captured; or an invalid batch.

    >>> from conadv_lab.methods.base import Vanilla
    >>> model = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> batch = torch.ones(4, 2), torch.zeros(4).long()
    >>> step = CapturedStep(model, Vanilla(), optimizer, nn.CrossEntropyLoss(), batch)
    >>> first, second = step(*batch).clean, step(*batch).clean
    >>> bool(second < first)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: Optimizer,
        criterion: Criterion,
        example: tuple[Any, Any],
        *,
        capture: Capture = "auto",
    ) -> None:
        device = next(model.parameters()).device
        images_and_labels(example)
        backend, line = backend_of(capture, device, reason_against(device, optimizer) or hooked(model))
        if line:
            _tell(line)
        self._begin(model, method, optimizer, criterion, device, backend, capture == "on")

    def _begin(
        self,
        model: nn.Module,
        method: Method,
        optimizer: Optimizer,
        criterion: Criterion,
        device: torch.device,
        backend: Backend | None,
        required: bool,
    ) -> None:
        self.method, self.optimizer, self.device = method, optimizer, device
        self.copies = Copies(device)
        self.rates = rates_on(optimizer, device) if backend is not None else []
        if device.type == "cuda" and backend is not None:
            method.lanes = Streams(device)
        if isinstance(optimizer, torch.optim.SGD) and any(group["fused"] for group in optimizer.param_groups):
            optimizer.register_step_pre_hook(begin_momenta)
        self.program = Program(
            model, model, method, optimizer, criterion,
            rates=self.rates, backend=backend, required=required, told=_tell,
        )  # fmt: skip
        self.calls = self.taken = self.seen = 0
        self.last = ENDLESS
        self._batches: dict[int, Batch] = {}

    def __call__(self, images: Any, labels: Any) -> Losses | None:
        """Train on a batch, or on that from τ calls earlier; returns its mean losses, valid until the next call.

        Args:
            images: (B, …) floats in [0, 1]; labels: (B,) int64, or probabilities; both on the host or the device. They
                are copied, from pinned memory asynchronously as with ``non_blocking``: do not overwrite a pinned
                tensor before the GPU has read it. A DataLoader makes new ones.
        """
        images, labels = images_and_labels((images, labels))
        indices = torch.arange(self.seen, self.seen + len(images), device=self.device)
        batch = Batch(
            _there(images, self.device), _there(labels, self.device), torch.zeros_like(indices), indices, 1.0
        )
        self._batches[self.calls] = batch
        self.seen += len(images)
        self.calls += 1
        return self._stepped() if self.calls - self.taken > self.method.lookahead else None

    def rest(self) -> Iterator[Losses]:
        """Train on the batches that remain because the method looks ahead; later calls start a new look-ahead.

        Training happens lazily, as the iterator is consumed.
        """
        self.last = self.calls - 1
        while self.taken < self.calls:
            yield self._stepped()
        self.last = ENDLESS

    def _stepped(self) -> Losses:
        number, held = self.taken, self._batches
        held.pop(number - 2, None)
        step = Step(number, self.method.lookahead, self.last, _one(held), _size(held))
        self.taken += 1
        if self.rates:
            groups = len(self.optimizer.param_groups)
            if groups > len(self.rates):  # a group was added
                self.rates += rates_on(self.optimizer, self.device)[len(self.rates) :]
            take_over(self.optimizer, self.rates)
        if self.program.captures:
            step = self.copies.load(step, self.method.offsets(step))
        return self.program(step)


def _one(held: dict[int, Batch]) -> Callable[[int], list[Batch]]:
    return lambda number: [held[number]]


def _size(held: dict[int, Batch]) -> Callable[[int], list[int]]:
    return lambda number: [len(held[number].labels)]


def _there(values: Tensor, device: torch.device) -> Tensor:
    # Copy on the same device too: the batch is used in later steps, and a loop may reuse one tensor for all of them.
    return values.to(device, non_blocking=True, copy=True)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
