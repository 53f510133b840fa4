"""Copies from host memory to the device."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BUFFERS = 3
"""Buffers of a `Sender`: one is being filled, one is being copied, and one awaits use."""


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to ``device``; the host does not wait for earlier work on a GPU.

    A copy from pageable memory waits for the whole stream, a copy from pinned memory is queued in it.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Sender:
    """Sends batches of pixels to a GPU in the background, without using the training thread or stream.

    A thread copies each batch into a ring of pinned buffers, and from there to the GPU on its own stream. The gain is
    not measured.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._ring = [_Buffer() for _ in range(BUFFERS)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sending")

    def begin(self, read: Callable[[], Tensor]) -> "Sending":
        """Send the contiguous tensor that ``read`` returns, after everything begun earlier."""
        return Sending(self._thread.submit(self._send, read))

    def _send(self, read: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        values = read()
        buffer = self._ring.pop(0)
        self._ring.append(buffer)
        pinned = buffer.filled(values, pinned=self.device.type == "cuda")
        with torch.cuda.stream(self._stream):
            there = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=self.device)
            there.copy_(pinned, non_blocking=True)
            buffer.sent = torch.cuda.Event()
            buffer.sent.record(self._stream)
        return there, buffer.sent


class Sending:
    """A batch on its way to the GPU."""

    def __init__(self, task: Future[tuple[Tensor, Any]]) -> None:
        self._task = task

    def taken(self) -> Tensor:
        """The batch on the GPU; the current stream waits for the copy, the host only until it is queued.

        Raises:
            OSError: it could not be read.
        """
        there, arrived = self._task.result()
        stream = torch.cuda.current_stream(there.device)
        stream.wait_event(arrived)
        # Its memory belongs to the other stream, which must not reuse it before this one is done.
        there.record_stream(stream)
        return there

    def settle(self) -> None:
        """Wait until the source is no longer being read, ignoring errors."""
        self._task.exception()


class _Buffer:
    """Pinned memory; ``sent`` is the event after the latest copy from it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.sent: Any = None

    def filled(self, values: Tensor, pinned: bool) -> Tensor:
        if self.sent is not None:
            self.sent.synchronize()
        size = values.numel() * values.element_size()
        if self.bytes.numel() < size:
            self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        room = self.bytes[:size].view(values.dtype).as_strided(values.shape, values.stride())
        return room.copy_(values)
