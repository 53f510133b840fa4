"""The stream of global steps: each with its own images, those of upcoming steps and those of the previous step."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from conadv_lab.data.order import places
from conadv_lab.data.tokens import Tokens
from conadv_lab.data.transfer import sent
from conadv_lab.mistakes import require


@dataclass(frozen=True)
class Batch:
    """One micro-batch and the identity of its images.

    Attributes:
        images: (m, C, H, W) float in [0, 1], or other inputs (m, …); of tokens the perturbation of their embeddings.
        labels: (m,) int64, or (m, classes) probabilities with mixup.
        epochs, indices: (m,) int64, epoch and index in the data set; random numbers depend on these.
        share: this micro-batch's fraction of its step's images; the shares of a step add up to 1.
        tokens: what a token model is called with.
    """

    images: Tensor
    labels: Tensor
    epochs: Tensor
    indices: Tensor
    share: float
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Step:
    """One global step.

    Attributes:
        number: from 0.
        ahead: how many steps ahead `batches` may look.
        last: number of the last training step.
        fetch: gives the micro-batches of a step by number, made when iterated over.
        counts: gives how many images each of those has.
        replays: how many consecutive steps have the same images.
        layout: shapes, dtypes and strides of the batches, if steps with other layouts use other tensors.
    """

    number: int
    ahead: int
    last: int
    fetch: Callable[[int], Iterable[Batch]]
    counts: Callable[[int], list[int]]
    replays: int = 1
    layout: Hashable = None

    def batches(self, offset: int = 0) -> Iterable[Batch]:
        """Micro-batches of step ``number + offset``; offset -1 is the previous step."""
        return self.fetch(self._number(offset))

    def size(self, offset: int = 0) -> int:
        """Number of images in step ``number + offset``."""
        return sum(self.sizes(offset))

    def sizes(self, offset: int = 0) -> list[int]:
        """Number of images in each micro-batch of step ``number + offset``."""
        return self.counts(self._number(offset))

    def _number(self, offset: int) -> int:
        require(-1 <= offset <= self.ahead, "offset", offset, f"-1 to {self.ahead}, this stream's look-ahead")
        wanted = self.number + offset
        require(0 <= wanted <= self.last, "step", wanted, f"0 to {self.last}, the steps of this stream")
        return wanted


@runtime_checkable
class ImageSet(Protocol):
    """A data set whose images can be fetched by index."""

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(m,) int64 to images (m, C, H, W), uint8 or float in [0, 1], and (m,) int64 labels, on the device."""


Augmentation = Callable[[Tensor, Tensor, Tensor], Tensor]
Span = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One rank's part of each step: a pure function of the step's groups, so ranks need not communicate.

    Attributes:
        rank: from 0.
        ranks: number of ranks that share a step.
        spread: False: rank r gets whole groups r, r + ranks, …; True: it gets the r-th slice of every group.
    """

    rank: int = 0
    ranks: int = 1
    spread: bool = False

    def pieces(self, groups: list[Span]) -> list[Span]:
        """This rank's part of a step, whose groups are given as (first, last) positions.

        >>> Split(1, 2).pieces([(0, 4), (4, 8), (8, 10)]), Split(1, 2, spread=True).pieces([(0, 4), (4, 8)])
        ([(4, 8)], [(2, 4), (6, 8)])
        """
        if not self.spread:
            return groups[self.rank :: self.ranks]
        return [
            (first + self._cut(last - first, 0), first + self._cut(last - first, 1)) for first, last in groups
        ]

    def _cut(self, size: int, edge: int) -> int:
        return size * (self.rank + edge) // self.ranks


class Stream:
    """Steps over an `ImageSet`; order and augmentation depend only on (seed, epoch, index).

    Args:
        images: the set.
        seed: the run's.
        batch: new clean images per step.
        steps: number of training steps.
        micro_batch: largest number of images in one forward pass; also the ghost batch of batch norm.
        first_batch: new clean images of step 0, if different (the equal-cost forms take B, then B/2).
        augment: (images, epochs, indices) to images; None for no augmentation.
        split: this rank's part of each step's groups; by default all of them.
        replays: how many consecutive steps have the same images.

    Raises:
        ValueError: a batch that cannot be split so that every rank gets a part.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        seed: int,
        batch: int,
        steps: int,
        micro_batch: int | None = None,
        first_batch: int | None = None,
        augment: Augmentation | None = None,
        split: Split | None = None,
        replays: int = 1,
    ) -> None:
        self.images, self.seed, self.steps, self.augment = images, seed, steps, augment
        self.batch, self.first_batch, self.replays = batch, first_batch or batch, replays
        self.micro_batch = min(micro_batch or batch, batch)
        self.split = split or Split()
        self._image: Tensor | None = None
        self._require_parts_for_all()

    @property
    def epochs(self) -> int:
        """How many epochs the run's steps touch, the last one perhaps in part."""
        return -(-self.first_place(self.steps) // len(self.images))

    def step(self, number: int, ahead: int = 0) -> Step:
        return Step(number, ahead, self.steps - 1, self._batches, self._counts, self.replays)

    def first_place(self, number: int) -> int:
        """How many images come before step ``number``, replays not counted."""
        return self._place(-(-number // self.replays))

    def steps_of(self, epochs: float) -> int:
        """How many steps this many epochs take."""
        return round(epochs * len(self.images) * self.replays / self.batch)

    def groups(self, number: int) -> list[Span]:
        """(first, last) positions of each micro-batch of step ``number`` over all ranks: its ghost batches."""
        start, stop = self._span(number)
        # Cut a longer first step like a row of ordinary steps, so that its leading groups match the next step's.
        parts = [(part, min(part + self.batch, stop)) for part in range(start, stop, self.batch)]
        return [
            (first, min(first + self.micro_batch, end))
            for part, end in parts
            for first in range(part, end, self.micro_batch)
        ]

    def own_spans(self, number: int) -> list[Span]:
        """This rank's micro-batches of step ``number``, or slices of them."""
        return self.split.pieces(self.groups(number))

    def image(self) -> Tensor:
        """A sample image (C, H, W) as in a step, for its shape and dtype."""
        if self._image is None:
            self._image = self._batch(0, 1, 1.0).images[0]
        return self._image

    def _span(self, number: int) -> Span:
        fresh = number // self.replays
        return self._place(fresh), self._place(fresh + 1)

    def _place(self, batch: int) -> int:
        return 0 if batch == 0 else self.first_batch + (batch - 1) * self.batch

    def _counts(self, number: int) -> list[int]:
        return [last - first for first, last in self.own_spans(number)]

    def _batches(self, number: int) -> Iterator[Batch]:
        start, stop = self._span(number)
        count = stop - start
        for first, last in self.own_spans(number):
            yield self._batch(first, last, (last - first) / count)

    def _require_parts_for_all(self) -> None:
        ranks, groups = self.split.ranks, self.groups(1)
        smallest = min(last - first for first, last in groups)
        if not self.split.spread and len(groups) < ranks:
            raise ValueError(
                f"{ranks} ranks cannot share a step of {len(groups)} micro-batches (global batch {self.batch}, "
                f"micro_batch {self.micro_batch}); allowed: a micro_batch of at most {max(1, self.batch // ranks)}, "
                "fewer ranks, or batch_norm sync, which splits each micro-batch over the ranks"
            )
        if self.split.spread and smallest < ranks:
            raise ValueError(
                f"{ranks} ranks cannot each get an image of a micro-batch of {smallest} (global batch "
                f"{self.batch}, micro_batch {self.micro_batch}); allowed: micro-batches of at least {ranks} images"
            )

    def _batch(self, first: int, last: int, share: float) -> Batch:
        return self.images_of(*places(self.seed, len(self.images), first, last), share=share)

    def images_of(self, epochs: Tensor, indices: Tensor, share: float = 1.0) -> Batch:
        """The images with these epochs and indices (m,), as in a step; both int64, on the host or the device."""
        images, labels = self.images.fetch(indices)
        if indices.device != images.device:
            epochs, indices = sent(torch.stack([epochs, indices]), images.device)
        images = as_float(images)
        if self.augment is not None:
            images = self.augment(images, epochs, indices)
        return Batch(images, labels, epochs, indices, share)


def as_float(images: Tensor) -> Tensor:
    """uint8 0 … 255 to float32 in [0, 1]; floats of any precision to float32."""
    floats = images.to(torch.float32)
    return floats.div_(255) if images.dtype == torch.uint8 else floats
