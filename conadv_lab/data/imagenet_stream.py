"""The stream of steps over photographs: read ahead by worker processes, and cached for reuse."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conadv_lab.data.hashing import image_keys
from conadv_lab.data.imagenet import FETCH_SLOTS, PhotoSet, read_ahead
from conadv_lab.data.imagenet_workers import Reading
from conadv_lab.data.loader import Batch, Span, Stream, as_float
from conadv_lab.data.mixup import mixed, mixup_weights
from conadv_lab.data.order import places
from conadv_lab.data.transfer import Sender, Sending, sent


@dataclass
class _Held:
    """A micro-batch in a slot; ``used`` once the stream has delivered it, ``sending`` while it is copied to a GPU."""

    slot: int
    reading: Reading
    used: bool = False
    sending: Sending | None = None

    def settle(self) -> None:
        """Wait until nothing writes to or reads from the slot."""
        if self.sending is not None:
            self.sending.settle()
        self.reading.settle()


class PhotoStream(Stream):
    """A `Stream` over a training `PhotoSet` that reads ahead and caches micro-batches that are read again.

    Look-ahead and recycling request every micro-batch twice. It stays in its slot until the slot is needed, least
    recently used first, so with enough memory a photograph is decoded once. Neither caching nor reading ahead can
    change an image: all are pure functions of (seed, epoch, index).

    With ``mixup`` (α of its Beta distribution) an image is mixed with the one before it in the endless order of
    the run, the very first with itself, so the split into micro-batches and ranks does not matter; labels are then
    (m, classes) probabilities.
    """

    images: PhotoSet

    def __init__(self, images: PhotoSet, *, mixup: float = 0.0, **rest: Any) -> None:
        super().__init__(images, **rest)
        self.mixup = mixup
        readers = images.readers
        self._free = [slot for slot in range(readers.slots) if slot not in FETCH_SLOTS]
        self._held: dict[Span, _Held] = {}
        self._ahead = read_ahead(readers.workers, readers.slot_images)
        self._sender = Sender(images.device) if images.device.type == "cuda" else None

    def pixels(self, first: int, last: int) -> Tensor:
        """The images of a micro-batch, (m, 3, S, S) uint8 in shared memory, valid until the next call.

        With mixup the preceding image, if any, comes first.

        Raises:
            OSError: an image cannot be read.
        """
        return self._hold((first, last)).reading.wait()

    def _hold(self, span: Span) -> _Held:
        """A micro-batch that is read or being read; starts reading those that follow."""
        held = self._held.pop(span, None) or self._start(span, self._slot(needed=True))
        held.used = False
        self._held[span] = held
        for later in self._following(span):
            slot = None if later in self._held else self._slot(needed=False)
            if slot is not None:
                self._held[later] = self._start(later, slot)
        held.used = True
        return held

    def _on_device(self, span: Span) -> Tensor:
        """A micro-batch's pixels on the model's device; on a GPU also starts copying the next micro-batch."""
        if self._sender is None:
            return sent(self.pixels(*span), self.images.device)
        held = self._hold(span)
        sending, held.sending = held.sending or self._sender.begin(held.reading.wait), None
        follower = self._held.get(next(self._following(span), span))
        if follower is not None and follower is not held and follower.sending is None:
            follower.sending = self._sender.begin(follower.reading.wait)
        return sending.taken()

    def images_of(self, epochs: Tensor, indices: Tensor, share: float = 1.0) -> Batch:
        """As in `Stream`; with mixup each image is mixed with its predecessor here, the first one with itself."""
        pixels = self.images.augmented(epochs, indices)
        return self._finished(pixels, torch.stack([epochs, indices]), bool(self.mixup), share)

    def _batch(self, first: int, last: int, share: float) -> Batch:
        who = torch.stack(self._places(first, last))
        pixels = self._on_device((first, last))
        return self._finished(pixels, who, bool(self.mixup) and first == 0, share)

    def _finished(self, pixels: Tensor, who: Tensor, alone: bool, share: float) -> Batch:
        """A micro-batch of ``pixels``, whose (2, m) epochs and indices are ``who``.

        With mixup the first image is only mixed into the second, unless it is ``alone``.
        """
        images, labels = as_float(pixels), self.images.labels(who[1])
        epochs, indices = sent(who, images.device)
        if self.augment is not None:
            images = self.augment(images, epochs, indices)
        if self.mixup:
            if alone:
                images, labels = (torch.cat([values[:1], values]) for values in (images, labels))
            else:
                epochs, indices, who = epochs[1:], indices[1:], who[:, 1:]
            # on the host, where λ is computed
            keys = image_keys(self.seed, "mixup", *who)
            weights = sent(mixup_weights(keys, self.mixup), images.device)
            images, labels = mixed(images, labels, weights, self.images.classes)
        return Batch(images, labels, epochs, indices, share)

    def _places(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        before = 1 if self.mixup and first else 0
        return places(self.seed, len(self.images), first - before, last)

    def _start(self, span: Span, slot: int | None) -> _Held:
        assert slot is not None
        return _Held(slot, self.images.begin(slot, *self._places(*span)))

    def _following(self, span: Span) -> Iterator[Span]:
        """The next micro-batches in the run's order, as many as are read ahead."""
        if not self._ahead:
            return
        fresh = 0 if span[0] < self.first_batch else 1 + (span[0] - self.first_batch) // self.batch
        step = fresh * self.replays
        own = self.own_spans(step)
        if span not in own:
            return  # the caller does not follow the run's order
        later = own[own.index(span) + 1 :]
        while len(later) < self._ahead and step + self.replays < self.steps:
            step += self.replays
            later += self.own_spans(step)
        yield from later[: self._ahead]

    def _slot(self, needed: bool) -> int | None:
        """A free slot, or that of the least recently used micro-batch; if ``needed``, any micro-batch's."""
        if self._free:
            return self._free.pop()
        used = next((span for span, held in self._held.items() if held.used), None)
        if used is None and not needed:
            return None
        held = self._held.pop(used or next(iter(self._held)))
        held.settle()
        return held.slot
