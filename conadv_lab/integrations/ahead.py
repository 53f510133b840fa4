"""Look-ahead for trainers that own the loop: a resumable loader of steps, epoch by epoch."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from conadv_lab.data.loader import Batch, Step
from conadv_lab.data.lookahead import shared, step_of
from conadv_lab.integrations.reader import Device, Reader
from conadv_lab.methods.base import Method
from conadv_lab.mistakes import require
from conadv_lab.training.weights import on_device


def require_one_process(trainer: str, processes: int) -> None:
    """Raise ``ValueError`` if a trainer runs in several processes, whatever the method."""
    if processes > 1:
        raise ValueError(
            f"{trainer} runs in {processes} processes; allowed: 1, with any method. For several use a script with "
            "DistributedDataParallel, as in docs/ddp.md, or conadv_lab.train"
        )


def require_method(method: object) -> None:
    """Raise ``ValueError`` for anything but a method, such as its name."""
    require(isinstance(method, Method), "method", method, "a method, such as ConAdv(SignAttack(1 / 255))")


def require_first(mixin: type, cls: type) -> None:
    """Raise ``TypeError`` if a class takes its training step from a library's class before the mixin."""
    owner = next(one for one in cls.__mro__ if "training_step" in vars(one))
    if not issubclass(owner, mixin):
        raise TypeError(
            f"{cls.__name__} has {owner.__name__} before {mixin.__name__}; allowed: "
            f"class {cls.__name__}({mixin.__name__}, {owner.__name__})"
        )


class Ahead:
    """A loader whose items are steps that see the batches of later steps, as from `conadv_lab.lookahead`.

    One iteration gives the steps of one epoch, ``len(loader) // accumulate``. Batches read ahead are kept for the next
    epoch, so a shuffled loader is read only once, and attacks cross epochs.

    A checkpoint has pending attacks and the position in the loader, but no images: on resuming they are read again.
    So that a shuffled loader without a seed then gives the same images, the loader runs under its own random state, a
    function of (seed, epoch), and leaves those of torch, NumPy and Python unchanged. Generators of the loader and its
    sampler are saved and restored. Images that depend on anything else differ; the checksum in the checkpoint detects
    this, and steps that were already attacked are then attacked again, with a warning.

    Args:
        loader: a list or a DataLoader of ``(images, labels)`` or mappings, with a length.
        method: decides how far to look ahead; its state is part of the checkpoint.
        accumulate: batches of the loader in one step.
        steps: how many steps will be trained; None where that is not known, which costs a few attacks at the end.
        device: the model's device, or a function that returns it once known; None leaves the batches where they are.
        seed: for the loader's random state; None: ``torch.initial_seed()``.
        embeddings: a token model's embedding layer, as for `conadv_lab.lookahead`.

    Raises:
        ValueError: a number out of range, or a loader without a length or with too few batches.

    >>> from conadv_lab import ConAdv, SignAttack
    >>> loader = [(torch.zeros(2, 1, 2, 2), torch.zeros(2).long())] * 3
    >>> ahead = Ahead(loader, ConAdv(SignAttack(0.1), staleness=1))
    >>> [(step.number, step.ahead) for epoch in range(2) for step in ahead]
    [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        method: Method,
        *,
        accumulate: int = 1,
        steps: int | None = None,
        device: Device | Callable[[], Device] = None,
        seed: int | None = None,
        embeddings: nn.Module | None = None,
    ) -> None:
        require_method(method)
        for name, value in (("accumulate", accumulate), ("steps", 1 if steps is None else steps)):
            require(isinstance(value, int) and value >= 1, name, value, "a whole number of at least 1")
        self.loader, self.method, self.accumulate, self.steps = loader, method, accumulate, steps
        self._device, self._embeddings = device, embeddings
        self._reader = Reader(loader, torch.initial_seed() if seed is None else seed, embeddings)
        self._held: dict[int, list[Batch]] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self.number = self.trained = 0
        self._per_epoch = self._steps_of_an_epoch()

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[Step]:
        """The remaining steps of this epoch."""
        # Evaluated at the first step: trainers create an iterator before they load a checkpoint.
        for _ in range(len(self) - self.number % len(self)):
            if self.steps is not None and self.number >= self.steps:
                return
            yield self._next()

    @property
    def device(self) -> Device:
        return self._device() if callable(self._device) else self._device

    def done(self, step: Step) -> None:
        """Record that a step was trained: a checkpoint resumes after it, whatever was already handed out."""
        self.trained = step.number + 1

    def state_dict(self) -> dict[str, Any]:
        """Pending attacks and the loader's position: tensors and plain values only.

        Raises:
            ValueError: steps were fetched or trained without `done`, so that the position is unknown.
        """
        first = self._first(self.trained)
        if first < min(self._held, default=first):
            raise ValueError(
                f"{self.number} steps were fetched and {self.trained} are done; allowed: one more than are done; "
                "call done(step) after each step of the optimizer"
            )
        epoch, place = self._places.get(first, (self._reader.epoch, self._reader.place))
        held = [number for number in sorted(self._held) if number >= first]
        return {
            "number": self.trained,
            "seed": self._reader.seed,
            "epoch": epoch,
            "place": place,
            "generators": self._reader.starts.get(epoch, self._reader.states()),
            "held": held,
            "images": self._checksum(held),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`, with a loader and a method made with the same arguments."""
        self._reader = Reader(self.loader, state["seed"], self._embeddings)
        self._reader.go_to(state["epoch"], state["place"], state["generators"])
        self._held, self._places = {}, {}
        self.number = self.trained = state["number"]
        for number in state["held"]:
            self._hold(number)
        method = state["method"]
        if self._checksum(state["held"]) != state["images"]:
            again = ", so pending steps are attacked again" if method.get("pending") else ""
            warnings.warn(
                f"the loader gives other images for step {self.number} than before the stop{again}; images that depend "
                "only on (epoch, index) or on torch's, NumPy's or Python's random state are reproduced"
            )
            method = method | {"pending": type(method["pending"])()} if again else method
        device = self.device
        self.method.load_state_dict(method if device is None else on_device(method, torch.device(device)))

    def _next(self) -> Step:
        number, ahead, replays = self.number, self.method.lookahead, self.method.replays
        last = number + ahead if self.steps is None else self.steps - 1
        for wanted in range(number // replays, min(number + ahead, last) // replays + 1):
            if wanted not in self._held:
                self._hold(wanted)
        first = self._first(number)
        self._held = {fresh: batches for fresh, batches in self._held.items() if fresh >= first}
        # A trainer may have requested one step more than it has trained.
        self._places = {fresh: place for fresh, place in self._places.items() if fresh >= first - 2}
        self.number += 1
        return step_of(dict(self._held), number, ahead, last, replays)

    def _hold(self, number: int) -> None:
        place, batches = None, []
        for _ in range(self.accumulate):
            batch, where = self._reader.read(self.device)
            place = place or where
            batches.append(batch)
        assert place is not None
        self._held[number], self._places[number] = shared(batches), place

    def _first(self, number: int) -> int:
        """The earliest step whose images step ``number`` may request: the previous one."""
        return max(0, number - 1) // self.method.replays

    def _checksum(self, numbers: list[int]) -> str:
        digest = sha256()
        for number in numbers:
            for batch in self._held[number]:
                inputs = [batch.images] if batch.tokens is None else batch.tokens.tensors()
                for tensor in (*inputs, batch.labels):
                    digest.update(
                        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    )
        return digest.hexdigest()

    def _steps_of_an_epoch(self) -> int:
        try:
            batches = len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            kind = type(self.loader).__name__
            raise ValueError(
                f"the loader, of type {kind}, has no length; allowed: a list or a DataLoader "
                "over a data set with a length"
            ) from None
        if batches < self.accumulate:
            raise ValueError(
                f"the loader has {batches} batches; allowed: at least {self.accumulate}, "
                f"as accumulate is {self.accumulate}"
            )
        return batches // self.accumulate
