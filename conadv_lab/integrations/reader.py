"""A loader's batches, epoch by epoch, that can be read again from any place."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Batch
from conadv_lab.data.lookahead import batch_of

Device = torch.device | str | None


class Reader:
    """The batches of a loader, epoch by epoch, each epoch under a random state determined by (seed, epoch).

    Attributes:
        epoch, place: position of the next batch.
        starts: states of the loader's generators at the start of each epoch that may be read again.
    """

    def __init__(self, loader: Iterable[Any], seed: int, embeddings: nn.Module | None) -> None:
        self.loader, self.seed, self.embeddings = loader, seed, embeddings
        self.epoch = self.place = self._images = 0
        self.starts: dict[int, list[Tensor | None]] = {}
        self._batches: Iterator[Any] | None = None
        self._random = _Random(seed, 0)

    def read(self, device: Device) -> tuple[Batch, tuple[int, int]]:
        """The next batch, on the device, and its (epoch, place)."""
        raw = self._raw()
        batch, where = (
            batch_of(raw, self.epoch, self._images, device, self.embeddings),
            (self.epoch, self.place),
        )
        self._images += len(batch.labels)
        self.place += 1
        return batch, where

    def go_to(self, epoch: int, place: int, states: list[Tensor | None]) -> None:
        """Read an epoch again up to its batch ``place``."""
        self.epoch, self.place, self._images = epoch, 0, 0
        if any(now is None and then is not None for now, then in zip(self.states(), states, strict=True)):
            self.read(None)  # Accelerate's sampler, for one, creates its generator with the first batch
            self.place = self._images = 0
        for generator, state in zip(self._generators(), states, strict=True):
            if generator is not None and state is not None:
                generator.set_state(state)
        self._begin()
        for _ in range(place):
            self.read(None)

    def _raw(self) -> Any:
        if self._batches is None:
            self._begin()
        for _ in range(2):
            with self._random.used():
                for batch in self._batches or ():
                    return batch
            if self.place == 0:
                break
            self.epoch, self.place, self._images = self.epoch + 1, 0, 0
            self._begin()
        raise ValueError(
            f"the loader yielded no batch in epoch {self.epoch}; allowed: a list or a DataLoader, "
            "which can be iterated over repeatedly"
        )

    def _begin(self) -> None:
        self.starts = {e: states for e, states in self.starts.items() if e >= self.epoch - 2}
        self.starts[self.epoch] = self.states()
        samplers = (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None))
        parts: tuple[Any, ...] = (self.loader, *samplers)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
        self._random = _Random(self.seed, self.epoch)
        with self._random.used():
            self._batches = iter(self.loader)

    def _generators(self) -> list[torch.Generator | None]:
        """The generators of the loader, its sampler and its batch sampler's sampler; None where there is none."""
        sampler = getattr(self.loader, "sampler", None)
        inner = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        found = (getattr(part, "generator", None) for part in (self.loader, sampler, inner))
        return [one if isinstance(one, torch.Generator) else None for one in found]

    def states(self) -> list[Tensor | None]:
        return [one if one is None else one.get_state() for one in self._generators()]


class _Random:
    """States of torch's CPU, NumPy's and Python's global generators, active while a loader reads."""

    def __init__(self, seed: int, epoch: int) -> None:
        drawn = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(3)
        before = self._now()
        torch.default_generator.manual_seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))  # noqa: NPY002 - data sets draw from it
        random.seed(int(drawn[2]))
        self._states = self._now()
        self._set(before)

    @contextmanager
    def used(self) -> Iterator[None]:
        before = self._now()
        self._set(self._states)
        try:
            yield
        finally:
            self._states = self._now()
            self._set(before)

    def _now(self) -> tuple[Any, Any, Any]:
        return torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def _set(self, states: tuple[Any, Any, Any]) -> None:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
