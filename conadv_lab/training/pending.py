"""Gathers a method's state from all ranks for a checkpoint, and back; see `conadv_lab.methods.base.Method.state_dict`.

Pending perturbations become one list of global groups, independent of the split over ranks. At a batch of 96K they are
gigabytes, sent micro-batch by micro-batch by the threads that write checkpoints while training goes on.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from conadv_lab.data.loader import Stream
from conadv_lab.methods.base import Method
from conadv_lab.mistakes import require
from conadv_lab.training.distributed import Ranks

PARTS = ("pending", "shared", "own")


def gatherable_state(method: Method) -> dict[str, Any]:
    """The method's state on this rank.

    Raises:
        ValueError: the method's state has parts that cannot be gathered.
    """
    state = dict(method.state_dict())
    if unknown := set(state) - set(PARTS):
        raise ValueError(
            f"{type(method).__name__} keeps {', '.join(map(repr, sorted(unknown)))}; allowed: "
            f"{', '.join(map(repr, PARTS))}, which say how a state is shared over ranks"
        )
    return state


def gathered_state(state: dict[str, Any], stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """The method's state for a checkpoint, on rank 0; a collective call of all trainers. See `Method.state_dict`.

    ``own`` becomes a list with one entry per trainer.

    Args:
        state: this rank's, on the host; must not change any more.
        stream: this rank's.
        ranks: of the run.
        next_step: number of the next step.
    """
    state = dict(state)
    if "own" in state:
        state["own"] = _of_all(state["own"], ranks)
    if ranks.trainers == 1 or "pending" not in state:
        return state
    pending = state["pending"]
    if isinstance(pending, dict):
        return state | {"pending": {n: _gathered(pending[n], stream, ranks, n) for n in sorted(pending)}}
    return state | {"pending": _gathered(pending, stream, ranks, next_step - 1) if pending else []}


def scattered_state(state: dict[str, Any], stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """This rank's part of what `gathered_state` returned; ``pending`` may come from any number of ranks.

    Raises:
        ValueError: the checkpoint has per-rank state from another number of ranks.
    """
    state = dict(state)
    if not ranks.trains:
        return {"pending": {number: [] for number in state["pending"]}} if state else state
    if "own" in state:
        require(
            len(state["own"]) == ranks.trainers,
            "the number of ranks that train",
            ranks.trainers,
            f"{len(state['own'])}, as the checkpoint has per-rank state",
        )
        state["own"] = state["own"][ranks.number]
    if ranks.count == 1 or "pending" not in state:
        return state
    pending = state["pending"]
    if isinstance(pending, dict):
        return state | {"pending": {number: _own(kept, stream, number) for number, kept in pending.items()}}
    return state | {"pending": _own(pending, stream, next_step - 1) if pending else []}


def _of_all(own: Any, ranks: Ranks) -> list[Any]:
    """Every trainer's own state on rank 0, each shaped like rank 0's; tensors are sent one by one."""
    leaves, form = tree_flatten(own)
    if not ranks.first:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                dist.send(leaf.contiguous(), dst=0, group=ranks.patient)
        return []
    states = [own]
    for rank in range(1, ranks.trainers):
        received = [_received(leaf, rank, ranks) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        states.append(tree_unflatten(received, form))
    return states


def _received(like: Tensor, rank: int, ranks: Ranks) -> Tensor:
    there = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    dist.recv(there, src=rank, group=ranks.patient)
    return there


def _gathered(own: list[Tensor], stream: Stream, ranks: Ranks, number: int) -> list[Tensor]:
    if not ranks.first:
        for piece in own:
            dist.send(piece.contiguous(), dst=0, group=ranks.patient)
        return []
    groups, like, mine = stream.groups(number), own[0], iter(own)
    splits = [replace(stream.split, rank=rank) for rank in range(ranks.trainers)]
    # In order of position, the order in which each rank sends its own.
    pieces = iter(sorted((span, rank) for rank, split in enumerate(splits) for span in split.pieces(groups)))
    gathered = []
    for start, stop in groups:
        rows = like.new_empty(stop - start, *like.shape[1:])
        filled = 0
        while filled < stop - start:
            (first, last), rank = next(pieces)
            if rank:
                dist.recv(rows[first - start : last - start], src=rank, group=ranks.patient)
            else:
                rows[first - start : last - start] = next(mine)
            filled = last - start
        gathered.append(rows)
    return gathered


def _own(kept: list[Tensor], stream: Stream, number: int) -> list[Tensor]:
    groups = dict(zip(stream.groups(number), kept, strict=True))
    return [
        rows[first - start : last - start].clone()
        for first, last in stream.split.pieces(list(groups))
        for (start, stop), rows in groups.items()
        if start <= first and last <= stop
    ]
