"""From the host's memory to the device."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BUFFERS = 3
"""Of a `Sender`: one is filled while another one is copied, and a third is on its way to be used."""


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; a GPU gets them without the host waiting for what was launched there before.

    A copy from ordinary memory waits for the whole stream, one from pinned memory takes its place in it.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Sender:
    """Sends batches of pixels to a GPU beside the training, whose thread and stream do nothing of it.

    A thread copies what is read into a ring of pinned buffers, and from there it goes to the GPU on a stream of its
    own. The gain is not measured.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._ring = [_Buffer() for _ in range(BUFFERS)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sending")

    def begin(self, read: Callable[[], Tensor]) -> "Sending":
        """Send what ``read`` gives, a tensor without gaps, once it gives it; what was begun before goes first."""
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
        """The batch on the GPU; the current stream waits for it, and so does the host until it is on its way.

        Raises:
            OSError: it could not be read.
        """
        there, arrived = self._task.result()
        stream = torch.cuda.current_stream(there.device)
        stream.wait_event(arrived)
        there.record_stream(
            stream
        )  # its memory is the other stream's, and may be used anew only after this one
        return there

    def settle(self) -> None:
        """Wait until what was read is read no more, whatever came of it."""
        self._task.exception()


class _Buffer:
    """Memory that a GPU can copy from by itself; ``sent`` is the event after the latest such copy."""

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
