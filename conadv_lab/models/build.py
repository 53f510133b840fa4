"""The network of a run, built from a config's section."""

from typing import Any

import torch
from torch import nn

from conadv_lab import references
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.models.options import MODELS, TIMM, Model
from conadv_lab.references import is_file_reference
from conadv_lab.seeds import derived_seed


def build_model(section: Model, classes: int, seed: int, given: Any = None) -> nn.Module:
    """The network with mixture batch norm; its weights depend on the run's seed alone.

    Args:
        given: the argument for a user's function: the config.

    Raises:
        ValueError: a user's function returns something else, or timm has no such model.
    """
    # On the CPU, whatever the default device, so that the weights are the same everywhere.
    with torch.device("cpu"), torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "weights"))
        model = mixture_batch_norm(_network(section, classes, given))
    if section.precision == "float64":
        model = model.double()
    if section.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _network(section: Model, classes: int, given: Any) -> nn.Module:
    name = section.model
    if is_file_reference(name):
        model = references.made(name, given, returns="a torch.nn.Module")
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} returned {type(model).__name__}; allowed: a torch.nn.Module")
        return model
    if name.startswith(TIMM):
        from conadv_lab.models.timm_models import timm_model

        return timm_model(name.removeprefix(TIMM), classes)
    known = MODELS[name]
    return known.load()(classes, **{field: getattr(section, field) for field in known.reads})
