"""Whether a run's steps are captured, and why not."""

from typing import TYPE_CHECKING, Literal

import torch
from torch.optim import Optimizer

from conadv_lab.capture.replays import Backend, CudaGraphs
from conadv_lab.optim.rates import why_not

if TYPE_CHECKING:
    from conadv_lab.data.loader import Stream

Capture = Literal["auto", "on", "off"]
FEW = 8
"""Micro-batches of a rank's step up to which ``auto`` captures: beyond, launches are not what takes the time."""


def require_graphs(choice: Capture, device: torch.device) -> None:
    """Raise ``ValueError`` where a step has to be captured on a device that has no graphs."""
    if choice == "on" and device.type != "cuda":
        raise _refused(_no_graphs(device))


def _no_graphs(device: torch.device) -> str:
    return f"the device is {device.type!r}, and only CUDA has graphs"


def _refused(reason: str) -> ValueError:
    return ValueError(f"capture is 'on', but {reason}; allowed: 'auto', 'off'")


def reason_against(
    device: torch.device,
    optimizer: Optimizer,
    *,
    ranks: int = 1,
    placement: str = "serial",
    graphs: bool = False,
) -> str | None:
    """Why no step can be captured, whatever the method is; None where it may be tried.

    Args:
        ranks: that train together. placement: of the attack. graphs: whether torch.compile captures the network.
    """
    if device.type != "cuda":
        return _no_graphs(device)
    if placement == "ranks":
        return "the attack runs on other ranks"
    if ranks > 1:
        return f"{ranks} ranks sum their gradients while a step's last backward goes on"
    if graphs:
        return "compile_mode captures the network in graphs of its own"
    return why_not(optimizer)


def backend_of(
    choice: Capture, device: torch.device, reason: str | None, stream: "Stream | None" = None
) -> tuple[Backend | None, str | None]:
    """Who captures, and a line that says why nobody does where that is worth saying.

    Raises:
        ValueError: ``on``, and there is a reason against it.
    """
    if choice == "off":
        return None, None
    if choice == "on" and reason is not None:
        raise _refused(reason)
    if reason is None and choice == "auto" and stream is not None:
        batches = len(stream.own_spans(min(1, stream.steps - 1)))
        if batches > FEW:
            reason = f"a step has {batches} micro-batches, more than the {FEW} up to which that is faster"
    if reason is None:
        return CudaGraphs(device), None
    return None, f"steps are not captured: {reason}" if device.type == "cuda" else None
