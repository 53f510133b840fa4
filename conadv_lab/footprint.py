"""Predicts the memory of a training step from the model itself, by following the shapes of a forward pass."""

import math
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from conadv_lab.config import Config, demand_of
from conadv_lab.methods import method_of
from conadv_lab.optim.options import OPTIMIZERS

# Fitted to peak memory of ResNet-50 at 32 pixels and micro-batches of 12 to 256 on a CPU with torch 2.13: fragmentation
# of the allocator's heap, and workspaces of kernels and libraries. Not measured on a GPU.
_GAPS, _KERNELS = 1.75, 190_000_000


def image_shape(config: Config) -> tuple[int, int, int]:
    """(channels, height, width) of a training image."""
    data = config.data
    side = data.synthetic_pixels if data.dataset == "synthetic" else data.pixels
    return data.source.shape or (3, side, side)


def memory_bytes(
    config: Config, images: float, micro_batch: int, several: bool = False
) -> tuple[dict[str, int], int]:
    """(bytes by purpose, number of parameters) for a device that trains on this many clean images per step.

    Args:
        several: whether it is one of several devices, so that gradients are sent in buckets.
    """
    from conadv_lab.models.build import build_model
    from conadv_lab.training.network import network_of

    classes = config.data.source.classes or 1000
    model = build_model(config.model, classes, config.training.seed, config)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    states = OPTIMIZERS[config.optimization.optimizer].states
    shape = image_shape(config)
    values = torch.Size(shape).numel()
    method = method_of(config)
    both = 2 if method.together else 1
    network = network_of(model.train(), replace(config.model, compile=False), torch.device("cpu"))
    saved = activations(network, shape, next(model.parameters()).dtype)
    more = {"averaged weights": weights} if config.model.ema else {}
    more |= {"gradient buckets": 4 * parameters} if several else {}
    more |= {"copies of the weights": round(method.copies * 4 * parameters)} if method.copies else {}
    return {
        "weights": weights,
        **more,
        "gradients and optimiser": (1 + states) * 4 * parameters,
        "activations": round(_GAPS * micro_batch * both * saved),
        "kernels": _KERNELS,
        "images": micro_batch * both * 3 * 4 * values,
        "pending attacks": round(method.kept_bytes(config.training.steps or math.inf) * images * values),
    }, parameters


def activations(network: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes per image that a forward pass stores for its backward pass.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.Tanh())  # stores its input and output, float32
    >>> activations(net, (1, 1, 8))
    48
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def grown() -> int:
        """The difference drops what does not grow with the batch, such as statistics and cast weights."""
        four, two = (torch.zeros(size, *shape, dtype=dtype, device="cpu") for size in (4, 2))
        return (_kept(network, four) - _kept(network, two)) // 2

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without arithmetic
            return grown()
    except Exception:  # a layer that looks at values or is no torch operator; the real pass tells real errors
        return grown()


def _kept(network: nn.Module, images: Tensor) -> int:
    own = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = network(images)
    del outputs
    return sum(kept.values())


def host_bytes(config: Config) -> dict[str, int]:
    """Bytes of a process on the host: Python and torch as loaded here, and images being read."""
    parts: dict[str, int] = {"Python and torch": resident_bytes()}
    if config.data.source.photographs:
        from conadv_lab.data.imagenet import slots_of

        slots, images = slots_of(config.data, demand_of(config))
        parts["images being read"] = (
            slots * images * 3 * max(config.data.pixels, config.data.eval_pixels) ** 2
        )
    elif config.data.source.official:
        parts["data set"] = 60_000 * 3 * 32 * 32
    return parts


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process, or its peak, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak includes that of the parent process
        wanted = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(wanted))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
