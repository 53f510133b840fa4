"""Decides whether a run's steps are captured, with the reason if not."""

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from conadv_lab.capture.replays import Backend, CudaGraphs
from conadv_lab.data.loader import Stream
from conadv_lab.mistakes import unknown
from conadv_lab.models.mixture import MixtureBatchNorm
from conadv_lab.optim.rates import why_not

Capture = Literal["auto", "on", "off"]
FEW = 8
"""Largest number of micro-batches per rank for which ``auto`` captures: beyond it, launches hardly matter."""


def require_graphs(choice: Capture, device: torch.device) -> None:
    """Raise ``ValueError`` if a step must be captured on a device without graphs."""
    if choice == "on" and device.type != "cuda":
        raise refused(_no_graphs(device))


def _no_graphs(device: torch.device) -> str:
    return f"the device is {device.type!r}, and only CUDA has graphs"


def refused(reason: str) -> ValueError:
    """The error for ``capture='on'`` if a step cannot be captured."""
    return ValueError(f"capture is 'on', but {reason}; allowed: 'auto', 'off'")


def reason_against(
    device: torch.device, optimizer: Optimizer, *, placement: str = "serial", graphs: bool = False
) -> str | None:
    """Why no step can be captured, whatever the method; None if it can be tried.

    Args:
        placement: of the attack. graphs: whether torch.compile captures the network.
    """
    if device.type != "cuda":
        return _no_graphs(device)
    if placement == "ranks":
        return "the attack runs on other ranks"
    if graphs:
        return "compile_mode already captures the network in graphs"
    return why_not(optimizer)


def synchronised(model: nn.Module) -> str | None:
    """Why a model's passes cannot be captured over several ranks, as ranks exchange messages within them; or None."""
    for module in model.modules():
        ranks = module.mode.ranks if isinstance(module, MixtureBatchNorm) else None
        if isinstance(module, nn.SyncBatchNorm) or (ranks is not None and ranks.spread):
            return "batch norm is synchronised over ranks within each pass"
    return None


def slower(stream: Stream) -> str | None:
    """Why capturing a rank's steps would gain nothing; None if it would."""
    batches = len(stream.own_spans(min(1, stream.steps - 1)))
    if batches <= FEW:
        return None
    return f"a step has {batches} micro-batches; capturing is faster for at most {FEW}"


def hooked(model: nn.Module) -> str | None:
    """Why a model's gradients need ``.backward()``, whose hooks a captured step does not call; or None."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return "DistributedDataParallel sums gradients over ranks during the backward pass"
    for name, parameter in model.named_parameters():
        if hasattr(type(parameter), "placements"):  # a DTensor, as fully_shard makes them
            return "the parameters are sharded over ranks"
        if parameter._post_accumulate_grad_hooks:
            return f"{name} has a hook on its gradient, which a captured step would not call"
    return None


def backend_of(
    choice: Capture, device: torch.device, reason: str | None
) -> tuple[Backend | None, str | None]:
    """The backend that captures, or None with a line that says why, if that may surprise.

    Args:
        reason: against capturing.

    Raises:
        ValueError: ``on``, but there is a reason against it; or an unknown choice.
    """
    if choice not in get_args(Capture):
        raise unknown("capture", str(choice), get_args(Capture))
    if choice == "off":
        return None, None
    if choice == "on" and reason is not None:
        raise refused(reason)
    if reason is None:
        return CudaGraphs(device), None
    return None, f"steps are not captured: {reason}" if device.type == "cuda" else None
