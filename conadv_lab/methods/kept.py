"""What is kept of each micro-batch until a later step, in one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Kept:
    """Perturbations of one step, added micro-batch by micro-batch.

    One tensor for all: hundreds of small ones would lie between the activations that a CPU's heap frees, which then
    grows with their number.

    Args:
        images: of all micro-batches together.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self._rows: Tensor | None = None
        self._sizes: list[int] = []

    def add(self, part: Tensor) -> None:
        """Keep (m, …) of the next m images; the first part decides shape, dtype and device of all."""
        if self._rows is None:
            self._rows = part.new_empty(self.images, *part.shape[1:])
        start = sum(self._sizes)
        self._rows[start : start + len(part)] = part
        self._sizes.append(len(part))

    def parts(self) -> list[Tensor]:
        """What was added, as views.

        >>> import torch
        >>> kept = Kept(3)
        >>> kept.add(torch.tensor([[1], [2]])), kept.add(torch.tensor([[3]]))
        (None, None)
        >>> [part.tolist() for part in kept.parts()]
        [[[1], [2]], [[3]]]
        """
        return [] if self._rows is None else list(self._rows.split(self._sizes))
