"""State for later steps: tensors that are allocated once and updated in place, one per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Slots:
    """Perturbations of several steps, each step's in one tensor at a fixed address; after a step all move up.

    One tensor holds all micro-batches of a step: hundreds of small ones would fragment the CPU's heap between freed
    activations, which would then grow with their number.

    If there are more images than before, or of another size, tensors are reallocated and ``version`` changes: a step
    captured with another version would use memory that no longer belongs to these tensors.

    Args:
        count: number of tensors, in order of their steps.

    >>> import torch
    >>> slots = Slots(2)
    >>> slots.reserve(3)
    >>> slots.write(1, 0, torch.tensor([[1], [2]])), slots.write(1, 2, torch.tensor([[3]]))
    (None, None)
    >>> slots.move_up()
    >>> [part.tolist() for part in slots.parts(0, [2, 1])]
    [[[1], [2]], [[3]]]
    """

    def __init__(self, count: int) -> None:
        self.count, self.images, self.version = count, 0, 0
        self.rows: list[Tensor] = []

    def reserve(self, images: int) -> None:
        """Make room for this many images per step; keeps the contents, in new tensors if they were too small."""
        if images <= self.images:
            return
        self.images, old = images, self.rows
        self.version += 1
        self.rows = [rows.new_zeros(images, *rows.shape[1:]) for rows in old]
        for new, rows in zip(self.rows, old, strict=True):
            new[: len(rows)] = rows

    def write(self, slot: int, first: int, part: Tensor) -> None:
        """Store (m, …) for the images from ``first`` on; all of a step have the same shape and dtype."""
        if not self.rows:
            self.rows = [self._room(part) for _ in range(self.count)]
            self.version += 1
        if _kind(self.rows[slot]) != _kind(part):  # images of another size, as with progressive resizing
            if first:
                raise ValueError(
                    f"a step's micro-batches have perturbations of shapes {tuple(self.rows[slot].shape[1:])} and "
                    f"{tuple(part.shape[1:])}; allowed: one shape, as of images of one size or padded tokens"
                )
            self.rows[slot] = self._room(part)
            self.version += 1
        self.rows[slot][first : first + len(part)].copy_(part)

    def _room(self, part: Tensor) -> Tensor:
        return part.new_zeros(self.images, *part.shape[1:])

    def parts(self, slot: int, sizes: Sequence[int]) -> list[Tensor]:
        """A slot's contents as views for micro-batches of these sizes."""
        return list(self.rows[slot][: sum(sizes)].split(list(sizes))) if self.rows else []

    def adopt(self, slot: int, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts, copied into a slot unless they are already there."""
        sizes = [len(part) for part in parts]
        self.reserve(sum(sizes))
        own = self.parts(slot, sizes)
        if own and own[0].data_ptr() == parts[0].data_ptr():
            return own
        first = 0
        for part in parts:
            self.write(slot, first, part)
            first += len(part)
        return self.parts(slot, sizes)

    def move_up(self) -> None:
        """Copy each slot from the next one."""
        for slot, later in enumerate(self.rows[1:]):
            if _kind(self.rows[slot]) == _kind(later):
                self.rows[slot].copy_(later)
            else:
                self.rows[slot] = later.clone()
                self.version += 1


def _kind(rows: Tensor) -> tuple[object, ...]:
    return rows.shape[1:], rows.dtype, rows.device
