"""Whether a run's steps are captured, and why not."""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from conadv_lab.capture.replays import Backend, CudaGraphs
from conadv_lab.mistakes import unknown
from conadv_lab.optim.rates import why_not

if TYPE_CHECKING:
    from conadv_lab.data.loader import Stream

Capture = Literal["auto", "on", "off"]
FEW = 8
"""Micro-batches of a rank's step up to which ``auto`` captures: beyond, launches are not what takes the time."""


def require_graphs(choice: Capture, device: torch.device) -> None:
    """Raise ``ValueError`` where a step has to be captured on a device that has no graphs."""
    if choice == "on" and device.type != "cuda":
        raise refused(_no_graphs(device))


def _no_graphs(device: torch.device) -> str:
    return f"the device is {device.type!r}, and only CUDA has graphs"


def refused(reason: str) -> ValueError:
    """What a user is told who asks for a capture that cannot be."""
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


def hooked(model: nn.Module) -> str | None:
    """Why a model's gradients must be made by ``.backward()``, whose hooks a captured step does not call; or None."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return "DistributedDataParallel sums gradients over ranks while a backward goes on"
    for name, parameter in model.named_parameters():
        if hasattr(type(parameter), "placements"):  # a DTensor, as fully_shard makes them
            return "the weights are spread over ranks"
        if parameter._post_accumulate_grad_hooks:
            return f"{name} has a hook on its gradient, which a captured step would not call"
    return None


def backend_of(
    choice: Capture, device: torch.device, reason: str | None, stream: "Stream | None" = None
) -> tuple[Backend | None, str | None]:
    """Who captures, and a line that says why nobody does where that is worth saying.

    Raises:
        ValueError: ``on``, and there is a reason against it; or another choice.
    """
    if choice not in get_args(Capture):
        raise unknown("capture", str(choice), get_args(Capture))
    if choice == "off":
        return None, None
    if choice == "on" and reason is not None:
        raise refused(reason)
    if reason is None and choice == "auto" and stream is not None:
        batches = len(stream.own_spans(min(1, stream.steps - 1)))
        if batches > FEW:
            reason = f"a step has {batches} micro-batches, more than the {FEW} up to which that is faster"
    if reason is None:
        return CudaGraphs(device), None
    return None, f"steps are not captured: {reason}" if device.type == "cuda" else None
