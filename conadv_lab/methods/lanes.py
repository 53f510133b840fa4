"""Runs independent passes of a step: in sequence, or in parallel on CUDA streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from conadv_lab.methods.later import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Lanes:
    """In sequence; gradients accumulate in ``.grad`` through ``.backward()``.

    So hooks see every gradient: a reducer can send it during the backward pass, and DistributedDataParallel,
    fully_shard and reentrant checkpointing work.
    """

    def beside(self, *passes: Callable[[], Any]) -> list[Any]:
        """Run the passes and return their results; their gradients are added in the order of the passes."""
        return [run() for run in passes]

    def backward(self, loss: Tensor, model: nn.Module, images: Tensor | None = None) -> Tensor | None:
        """Add a loss's gradient to the parameters' ``.grad``; returns the gradient of ``images``, if given."""
        loss.backward()
        return None if images is None else images.grad


class Beside(Lanes):
    """In parallel: each pass has its own gradient tensors, which are added once all are done.

    They are added in the same order as in `Lanes`, so both give the same bits.
    """

    def __init__(self) -> None:
        self._gradients: list[tuple[list[nn.Parameter], list[Tensor | None]]] | None = None

    def beside(self, *passes: Callable[[], Any]) -> list[Any]:
        outside, returned, gathered = self._gradients, [], []
        try:
            with self._forked(len(passes)) as lanes:
                for lane, run in zip(lanes, passes, strict=True):
                    self._gradients = []
                    with lane:
                        returned.append(run())
                    gathered += self._gradients
        finally:  # a failed pass must not leave its list behind, which would collect all later gradients
            self._gradients = outside
        for gradients in gathered:
            self._keep(*gradients)
        return returned

    def backward(self, loss: Tensor, model: nn.Module, images: Tensor | None = None) -> Tensor | None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        wanted = parameters if images is None else [*parameters, images]
        gradients: list[Tensor | None] = list(torch.autograd.grad(loss, wanted, allow_unused=True))
        of_images = None if images is None else gradients.pop()
        self._keep(parameters, gradients)
        return of_images

    def _keep(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
        if self._gradients is not None:  # inside a pass; added after the join
            self._gradients.append((parameters, gradients))
            return
        there = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        sums = [(p.grad, g) for p, g in there if p.grad is not None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [gradient for _, gradient in sums])
        for parameter, gradient in there:
            if parameter.grad is None:
                parameter.grad = gradient

    def _forked(self, count: int) -> AbstractContextManager[list[AbstractContextManager[Any]]]:
        return nullcontext([nullcontext() for _ in range(count)])


class Streams(Beside):
    """`Beside` on CUDA streams. Meant for capture: a graph's memory stays allocated, so no tensor is freed too early.

    The first pass stays on the current stream, the others fork from it and join it.

    Raises:
        ValueError: the device is not a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        require_streams(device)
        self.device = device
        self._idle: list[torch.cuda.Stream] = []

    def _forked(self, count: int) -> AbstractContextManager[list[AbstractContextManager[Any]]]:
        return _Fork(self, count)


def require_streams(device: torch.device) -> None:
    """Raise ``ValueError`` if a device has no streams."""
    if device.type != "cuda":
        raise ValueError(
            f"placement is 'stream' on device {device.type!r}; allowed: on cuda, as only a GPU has streams"
        )


class _Fork:
    def __init__(self, lanes: Streams, count: int) -> None:
        self.lanes, self.here = lanes, torch.cuda.current_stream(lanes.device)
        while len(lanes._idle) < count - 1:
            lanes._idle.append(torch.cuda.Stream(lanes.device))
        self.others = [lanes._idle.pop() for _ in range(count - 1)]  # a nested fork uses others

    def __enter__(self) -> list[AbstractContextManager[Any]]:
        for stream in self.others:
            stream.wait_stream(self.here)
        return [nullcontext(), *(torch.cuda.stream(stream) for stream in self.others)]

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        # In a capture that a pass has broken off, waiting raises too, and would hide why.
        try:
            with suppress(RuntimeError) if failed else nullcontext():
                for stream in self.others:
                    self.here.wait_stream(stream)
        finally:
            self.lanes._idle += self.others
