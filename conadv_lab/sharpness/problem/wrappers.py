"""Models inside wrappers, and models whose weights cannot be put into one vector."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    It shares the wrapper's parameters, under shorter names. A compiled network has no second derivative, and replicas
    on several devices, or hooks that average gradients over ranks, would interfere with every product.

    >>> unwrapped(DataParallel(nn.Linear(2, 1)))
    Linear(in_features=2, out_features=1, bias=True)
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def require_whole(model: nn.Module) -> None:
    """Reject a model whose weights cannot be replaced or are sharded.

    Raises:
        ValueError: no module, TorchScript modules, or parameters that are sharded over processes.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is of type {type(model).__name__}; allowed: a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"module {name!r} of the model" if name else "the model"
            raise ValueError(
                f"{which} is TorchScript, whose weights cannot be replaced; allowed: the Python module that it "
                "was made from, with load_state_dict(scripted.state_dict())"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):  # only a DTensor has this
            raise ValueError(
                f"parameter {name!r} is a DTensor, sharded over processes (FSDP2, tensor parallelism); "
                "allowed: a plain copy of the model, loaded with "
                "{name: p.full_tensor() for name, p in model.state_dict().items()}"
            )
        if type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"parameter {name!r} is sharded over processes (FullyShardedDataParallel); allowed: a "
                "plain copy of the model, loaded with its full state dict"
            )


@contextmanager
def eager() -> Iterator[None]:
    """Context in which compiled code runs eagerly, as compiled code has no second derivative."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Context in which embeddings have dense gradients, as second derivatives and vectors need."""
    sparse: list[Any] = [
        m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse
    ]
    for module in sparse:
        module.sparse = False
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Context in which recurrent layers avoid cuDNN, whose backward pass needs train mode and has no derivative."""
    if not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield
        return
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
