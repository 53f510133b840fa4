"""Weights as such: loaded with a plain word on what does not fit, hashed, averaged, moved."""

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def parameters_sha256(model: nn.Module) -> str:
    """Hash of all parameters' names and bytes: equal for bitwise equal models."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str) -> None:
    """Load a state dict, or say in one sentence what does not fit.

    Raises:
        ValueError: names or shapes of another model.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [n for n in sorted(own.keys() & weights.keys()) if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        found = [("missing", missing), ("unexpected", extra), ("of another shape", wrong)]
        told = "; ".join(f"{len(names)} {what}, such as {names[0]!r}" for what, names in found if names)
        raise ValueError(f"the checkpoint in {place} is of another model: {told}")
    model.load_state_dict(weights)


def average_of(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential average that follows the model's weights; None without a decay."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def on_device(value: Any, device: torch.device) -> Any:
    """The tensors in nested dicts and lists, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return [on_device(item, device) for item in value] if isinstance(value, list) else value
