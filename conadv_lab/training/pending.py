"""A method's state of all ranks as a checkpoint has it, and back; see `conadv_lab.methods.base.Method.state_dict`.

Pending perturbations become one list of global groups, which depends on no split.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from conadv_lab.data.loader import Span, Stream
from conadv_lab.methods.base import Method
from conadv_lab.mistakes import require
from conadv_lab.training.distributed import Ranks

PARTS = ("pending", "shared", "own")


def gathered_state(method: Method, stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """The method's state for a checkpoint, on rank 0; all trainers must ask. See `Method.state_dict`.

    ``own`` becomes a list with an entry a trainer.

    Raises:
        ValueError: a method whose state has other parts than those that can be gathered.
    """
    state = dict(method.state_dict())
    if unknown := set(state) - set(PARTS):
        raise ValueError(
            f"{type(method).__name__} keeps {', '.join(map(repr, sorted(unknown)))}; allowed: "
            f"{', '.join(map(repr, PARTS))}, which say how a state is shared over ranks"
        )
    if "own" in state:
        state["own"] = _of_all(state["own"], ranks)
    if ranks.trainers == 1 or "pending" not in state:
        return state
    pending = state["pending"]
    if isinstance(pending, dict):
        return state | {"pending": {n: _gathered(pending[n], stream, ranks, n) for n in sorted(pending)}}
    return state | {"pending": _gathered(pending, stream, ranks, next_step - 1) if pending else []}


def scattered_state(state: dict[str, Any], stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """This rank's part of what `gathered_state` gave; of ``pending``, from whatever number of ranks.

    Raises:
        ValueError: there is a state of each rank's own, of another number of ranks.
    """
    state = dict(state)
    if not ranks.trains:
        return {"pending": {number: [] for number in state["pending"]}} if state else state
    if "own" in state:
        require(
            len(state["own"]) == ranks.trainers,
            "the number of ranks that train",
            ranks.trainers,
            f"{len(state['own'])}, as the checkpoint has a state of each rank's own",
        )
        state["own"] = state["own"][ranks.number]
    if ranks.count == 1 or "pending" not in state:
        return state
    pending = state["pending"]
    if isinstance(pending, dict):
        return state | {"pending": {number: _own(kept, stream, number) for number, kept in pending.items()}}
    return state | {"pending": _own(pending, stream, next_step - 1) if pending else []}


def _of_all(own: Any, ranks: Ranks) -> list[Any]:
    """Every trainer's own state on rank 0, each like rank 0's; its tensors are sent one after another."""
    leaves, form = tree_flatten(own)
    if not ranks.first:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                dist.send(leaf.detach().cpu().contiguous(), dst=0)
        return []
    states = [own]
    for rank in range(1, ranks.trainers):
        received = [_received(leaf, rank) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        states.append(tree_unflatten(received, form))
    return states


def _received(like: Tensor, rank: int) -> Tensor:
    there = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    dist.recv(there, src=rank)
    return there


def _gathered(own: list[Tensor], stream: Stream, ranks: Ranks, number: int) -> list[Tensor]:
    groups = stream.groups(number)
    rows = torch.cat(own).cpu()
    if not ranks.first:
        dist.send(rows, dst=0)
        return []
    pieces: dict[Span, Tensor] = {}
    for rank in range(ranks.trainers):
        spans = replace(stream.split, rank=rank).pieces(groups)
        sizes = [last - first for first, last in spans]
        if rank:
            rows = rows.new_empty(sum(sizes), *rows.shape[1:])
            dist.recv(rows, src=rank)
        pieces |= zip(spans, rows.split(sizes), strict=True)
    return [_rows(sorted(pieces), pieces, group) for group in groups]


def _rows(spans: Sequence[Span], pieces: dict[Span, Tensor], group: Span) -> Tensor:
    return torch.cat([pieces[first, last] for first, last in spans if group[0] <= first and last <= group[1]])


def _own(kept: list[Tensor], stream: Stream, number: int) -> list[Tensor]:
    groups = dict(zip(stream.groups(number), kept, strict=True))
    return [
        rows[first - start : last - start].clone()
        for first, last in stream.split.pieces(list(groups))
        for (start, stop), rows in groups.items()
        if start <= first and last <= stop
    ]
