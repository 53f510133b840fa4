"""Evaluates a user's model and loader without leaving a trace in either."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.sharpness.problem.arithmetic import full_float32
from conadv_lab.sharpness.problem.sameness import generators
from conadv_lab.sharpness.problem.wrappers import dense_gradients, differentiable_recurrence, eager


def _seed_all(seed: int) -> None:
    # Not torch.manual_seed: before CUDA starts, each call queues a stack trace that is never freed.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - augmentations of others may draw from it


@contextmanager
def untouched(model: nn.Module, batches: Any, bn: str, seed: int) -> Iterator[None]:
    """Set modes and random state for one evaluation, and restore everything, also after an exception.

    Every module is in evaluation mode, batch norm in train mode if ``bn == "train"``. Flags are set one by one, since
    a model may override ``train()``.
    """
    modes = [(module, module.training) for module in model.modules()]
    kept = [(restore, read()) for read, restore in generators(batches)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others may use
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        for module, _ in modes:
            module.training = bn == "train" and isinstance(module, _BatchNorm)
        _seed_all(seed)
        with full_float32(), eager(), dense_gradients(model), differentiable_recurrence(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for restore, state in kept:
            restore(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
