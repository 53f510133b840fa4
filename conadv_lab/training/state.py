"""The state that each rank saves in a checkpoint, and how a run restores it."""

from typing import Any

from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.optim.rates import plain_state
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import Parts
from conadv_lab.training.distributed import Ranks
from conadv_lab.training.pending import gatherable_state, gathered_state, scattered_state
from conadv_lab.training.weights import load_optimizer, load_weights, on_device


def state_of(parts: Parts, ema: Any, step: int, seconds: float) -> dict[str, Any]:
    """The state this rank checkpoints; ranks other than 0 save only their part of the method's state."""
    method = gatherable_state(parts.method)
    if not parts.ranks.first:
        return {"method": method}
    return {
        "step": step,
        "seconds": seconds,
        "model": parts.model.state_dict(),
        "optimizer": plain_state(parts.optimizer),
        "method": method,
        "ema": None if ema is None else ema.state_dict(),
        "schedule": parts.schedule.state_dict() if isinstance(parts.schedule, AutoWU) else None,
    }


def completed(parts: Parts, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's state plus the other ranks' parts of the method's state."""
    return state | {"method": gathered_state(state["method"], parts.stream, parts.ranks, step)}


def load_state(parts: Parts, ema: Any, state: dict[str, Any], source: str) -> None:
    """Load a checkpoint's state into a run's parts; errors name its ``source``."""
    load_weights(parts.model, state["model"], source)
    load_optimizer(parts.optimizer, state["optimizer"], source)
    own = scattered_state(state["method"], parts.stream, parts.ranks, state["step"])
    parts.method.load_state_dict(on_device(own, parts.device))
    if ema is not None:
        ema.load_state_dict(state["ema"])
    if isinstance(parts.schedule, AutoWU):
        parts.schedule.load_state_dict(state["schedule"], parts.device)


def newest(folder: RunFolder, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The (commit, state) that rank 0 resumes from, the same on all ranks."""
    there = ranks.first and folder.checkpoints.exists()
    loaded = folder.load_checkpoint() if there else None
    step = ranks.told_by_first(-1 if loaded is None else loaded[1]["step"])
    if ranks.first or step < 0:
        return loaded
    return read_checkpoint(folder.checkpoints / f"step_{step:08d}")
