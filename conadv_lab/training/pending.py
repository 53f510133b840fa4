"""Pending perturbations of all ranks as one list of global groups, and back: a checkpoint depends on no split."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conadv_lab.data.loader import Span, Stream
from conadv_lab.methods.base import Method
from conadv_lab.training.distributed import Ranks


def gathered_state(method: Method, stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """The method's state as one rank that trains alone would have it, on rank 0; all trainers must ask.

    Raises:
        ValueError: a method whose state is more than ``pending``.
    """
    state = method.state_dict()
    if ranks.trainers == 1 or not state:
        return state
    if set(state) != {"pending"}:
        raise ValueError(
            f"{type(method).__name__} keeps {', '.join(map(repr, state))}; "
            "allowed over several ranks: 'pending' alone, one tensor a micro-batch"
        )
    pending = state["pending"]
    if isinstance(pending, dict):
        return {"pending": {n: _gathered(pending[n], stream, ranks, n) for n in sorted(pending)}}
    return {"pending": _gathered(pending, stream, ranks, next_step - 1) if pending else []}


def scattered_state(state: dict[str, Any], stream: Stream, ranks: Ranks, next_step: int) -> dict[str, Any]:
    """This rank's part of what `gathered_state` gave, from whatever number of ranks."""
    if ranks.count == 1 or not state:
        return state
    pending = state["pending"]
    if not ranks.trains:
        return {"pending": {number: [] for number in pending}}
    if isinstance(pending, dict):
        return {"pending": {number: _own(kept, stream, number) for number, kept in pending.items()}}
    return {"pending": _own(pending, stream, next_step - 1) if pending else []}


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
