"""Memory that the operating system gives in pieces of their own, beside the heap that tensors share."""

import mmap

import torch
from torch import Tensor

LEAST_BYTES = 16_384
"""A mapping takes whole pages, and a process may have some ten thousands of them."""


def mapped_bytes(size: int) -> Tensor:
    """(size,) uint8, zeros; forked processes share them, and those that nobody writes to take no memory.

    Raises:
        OSError: more than there is.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def beside_the_heap(kept: Tensor) -> Tensor:
    """A copy that lies apart, for a tensor of the CPU that outlives the activations around it; others as they are.

    What is kept of each of hundreds of micro-batches would split the free memory between them, so that the heap
    grows with their number.
    """
    if kept.device.type != "cpu" or kept.nbytes < LEAST_BYTES:
        return kept
    return mapped_bytes(kept.nbytes).view(kept.dtype).view(kept.shape).copy_(kept)
