"""Loading, hashing, averaging and moving a model's weights."""

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from conadv_lab.optim.tensors import require_fit


def parameters_sha256(model: nn.Module) -> str:
    """Hash of all parameters' names and bytes: equal for bitwise equal models."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str) -> None:
    """Load a state dict, with a one-sentence error if it does not match.

    Raises:
        ValueError: names or shapes do not match the model.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [n for n in sorted(own.keys() & weights.keys()) if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        found = [("missing", missing), ("unexpected", extra), ("with another shape", wrong)]
        told = "; ".join(f"{len(names)} {what}, such as {names[0]!r}" for what, names in found if names)
        raise ValueError(f"the checkpoint in {place} does not match the model: {told}")
    model.load_state_dict(weights)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], place: str) -> None:
    """Load an optimizer's state dict, with a one-sentence error if it does not match.

    Raises:
        ValueError: it belongs to other parameters.
    """
    try:
        require_fit(optimizer, state)
    except ValueError as mistake:
        raise ValueError(f"the checkpoint in {place} does not match the optimizer: {mistake}") from None
    optimizer.load_state_dict(state)


class Average(AveragedModel):
    """torch's exponential moving average of the weights, bit for bit, but updated without synchronising with a GPU.

    torch's own copies the number of updates to the device in every step, and copies buffers one by one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        with torch.device("cpu"):  # keep the number of updates on the host
            super().__init__(model)
        self.decay = decay

    @property
    def begun(self) -> bool:
        return bool(self.n_averaged)

    def update_parameters(self, model: nn.Module) -> None:
        self.follow(model, self.begun)
        self.count()

    @torch.no_grad()
    def follow(self, model: nn.Module, begun: bool) -> None:
        """Update it with the current weights, or start with them; runs on the device alone."""
        for own, new in _by_dtype(self.module.parameters(), model.parameters()):
            if begun:
                torch._foreach_lerp_(own, new, 1 - self.decay)
            else:
                torch._foreach_copy_(own, new)
        for own, new in _by_dtype(self.module.buffers(), model.buffers()):
            torch._foreach_copy_(own, new)

    def count(self) -> None:
        """Count the update, on the host."""
        self.n_averaged += 1


def average_of(model: nn.Module, decay: float) -> Average | None:
    """An exponential moving average of the model's weights; None without a decay."""
    return Average(model, decay) if decay else None


def _by_dtype(own: Iterable[Tensor], other: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for one, two in zip(own, other, strict=True):
        some, others = groups.setdefault(one.dtype, ([], []))
        some.append(one)
        others.append(two)
    return list(groups.values())


def on_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested dicts and lists to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return [on_device(item, device) for item in value] if isinstance(value, list) else value
