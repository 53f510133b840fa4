"""Hugging Face Accelerate: you keep your own loop, and Accelerate's checkpoints include pending attacks."""

from collections.abc import Iterable
from typing import Any

from conadv_lab.integrations.ahead import Ahead, require_one_process
from conadv_lab.methods.base import Method


def look_ahead(accelerator: Any, loader: Iterable[Any], method: Method, **options: Any) -> Ahead:
    """Steps over a prepared loader; ``accelerator.save_state`` saves its position and pending attacks.

    Call ``ahead.done(step)`` after the optimizer's step: a checkpoint resumes after that step.

    Args:
        accelerator: an ``accelerate.Accelerator`` of one process, without fp16.
        loader: as ``accelerator.prepare`` returned it.
        method: see `Ahead`.
        options: further arguments of `Ahead`.

    Raises:
        ValueError: several processes, accumulation by Accelerate, or mixed precision with scaled gradients.
    """
    if not hasattr(accelerator, "num_processes"):
        raise ValueError(f"accelerator is a {type(accelerator).__name__}; allowed: an accelerate.Accelerator")
    require_one_process("Accelerate", accelerator.num_processes)
    batches = accelerator.gradient_accumulation_steps
    if batches != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {batches}; allowed: 1, and look_ahead(…, accumulate={batches})"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision is 'fp16'; allowed: 'no' and 'bf16', as loss scaling does not cover the attack"
        )
    ahead = Ahead(loader, method, device=accelerator.device, **options)
    accelerator.register_for_checkpointing(ahead)
    return ahead
