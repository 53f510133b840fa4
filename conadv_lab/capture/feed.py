"""The host's part of a step: writes what changes between steps into tensors with fixed addresses."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conadv_lab.data.loader import Batch, Step, Stream
from conadv_lab.data.order import places

BEFORE = 1
"""How many previous steps' images may be requested."""


class Block:
    """Integers and learning rates in one block of device memory, written with one asynchronous copy.

    Args:
        numbers: number of int64 values; rates: number of float32 ones, each in the first half of an int64 slot.
    """

    def __init__(self, numbers: int, rates: int, device: torch.device) -> None:
        self.host = torch.zeros(numbers + rates, dtype=torch.int64, device="cpu")
        self.there = self.host.to(device, copy=True)
        self.numbers = self.host[:numbers]
        self._rates = _floats(self.host[numbers:])
        self.rates = _floats(self.there[numbers:]).unbind()

    def send(self, rates: Sequence[float]) -> None:
        """Copy ``numbers`` and the learning rates to the device."""
        for place, rate in enumerate(rates):
            # Via float64: beyond float32 a value becomes infinite, which the next loss shows, instead of raising.
            self._rates[place] = torch.tensor(rate, dtype=torch.float64, device="cpu")
        # Pin a new buffer each time: the previous step's copy may not have started yet.
        values = self.host.pin_memory() if self.there.is_cuda else self.host
        self.there.copy_(values, non_blocking=True)


def _floats(words: Tensor) -> Tensor:
    return words.view(torch.float32)[::2]


class Feed:
    """Steps of a `Stream` over a set on the device: the host sends indices, the device makes the images.

    Args:
        stream: over a set whose ``fetch`` takes indices on the device.
        lookahead: how many steps ahead may be requested.
        rates: number of parameter groups whose learning rate is sent too.
    """

    def __init__(self, stream: Stream, lookahead: int, device: torch.device, rates: int = 0) -> None:
        self.stream, self.lookahead = stream, lookahead
        last = min(1, stream.steps - 1)
        self.images = max(sum(_sizes(stream, number)) for number in range(last + 1))
        self.shape = (BEFORE + 1 + lookahead, 2, self.images)
        self.block = Block(self.shape[0] * 2 * self.images, rates, device)
        self._host = self.block.numbers.view(self.shape)
        self._there = self.block.there[: self._host.numel()].view(self.shape)
        self._known: dict[int, Tensor] = {}

    def load(self, number: int, rates: Sequence[float] = ()) -> Step:
        """Send a step's indices and learning rates; its batches read them when iterated over."""
        stream = self.stream
        first, last = max(0, number - BEFORE), min(number + self.lookahead, stream.steps - 1)
        self._known = {
            n: self._known[n] if n in self._known else self._places(n) for n in range(first, last + 1)
        }
        for wanted, known in self._known.items():
            self._host[wanted - number + BEFORE, :, : known.shape[1]] = known
        self.block.send(rates)

        def batches(wanted: int) -> Iterator[Batch]:
            return self._batches(wanted, self._there[wanted - number + BEFORE])

        return replace(stream.step(number, self.lookahead), fetch=batches)

    def _places(self, number: int) -> Tensor:
        """Epochs and indices of this rank's images of a step, (2, n)."""
        stream = self.stream
        runs: list[list[int]] = []
        for first, last in stream.own_spans(number):  # group neighbours, as every look-up costs host time
            if runs and runs[-1][1] == first:
                runs[-1][1] = last
            else:
                runs.append([first, last])
        pairs = [torch.stack(places(stream.seed, len(stream.images), first, last)) for first, last in runs]
        return torch.cat(pairs, dim=1)

    def _batches(self, number: int, there: Tensor) -> Iterator[Batch]:
        stream, start = self.stream, 0
        count = sum(last - first for first, last in stream.groups(number))
        for size in _sizes(stream, number):
            epochs, indices = there[:, start : start + size]
            yield stream.images_of(epochs, indices, share=size / count)
            start += size


def _sizes(stream: Stream, number: int) -> list[int]:
    return [last - first for first, last in stream.own_spans(number)]


class Copies:
    """Steps whose images come from the host or any loader, copied into tensors with fixed addresses.

    Each layout of a batch (shapes, dtypes and strides) has its own tensors; the step reports it in ``layout``.
    """

    def __init__(self, device: torch.device, rates: int = 0) -> None:
        self.device = device
        self.block = Block(0, rates, device)
        self._there: dict[tuple, Batch] = {}

    def load(self, step: Step, offsets: Sequence[int], rates: Sequence[float] = ()) -> Step:
        """The step with its batches at these offsets copied; unchanged if there are none."""
        self.block.send(rates)
        if not offsets:
            return step
        copied: dict[int, list[Batch]] = {}
        layout = []
        for offset in offsets:
            batches = copied[step.number + offset] = []
            for place, batch in enumerate(step.batches(offset)):
                key = offset, place, *((v.shape, v.dtype, v.stride()) for v in _tensors(batch))
                batches.append(self._copied(key, batch))
                layout.append(key)
        return replace(step, fetch=copied.__getitem__, layout=tuple(layout))

    def _copied(self, key: tuple, batch: Batch) -> Batch:
        values = _tensors(batch)
        there = self._there.get(key)
        if there is None:
            images, labels, epochs, indices = (
                torch.empty_like(value, device=self.device) for value in values
            )
            there = self._there[key] = Batch(images, labels, epochs, indices, batch.share)
        for own, value in zip(_tensors(there), values, strict=True):
            own.copy_(value, non_blocking=True)
        return replace(there, share=batch.share)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.images, batch.labels, batch.epochs, batch.indices
