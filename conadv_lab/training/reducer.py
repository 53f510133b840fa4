"""Sums gradients over ranks in buckets, each sent while the backward pass continues."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conadv_lab.methods.alone import Gradients
from conadv_lab.methods.base import Losses
from conadv_lab.models.norm import MixtureBatchNorm
from conadv_lab.outside import is_captured, outside
from conadv_lab.training.distributed import Ranks

BUCKET_BYTES = 25 << 20
"""DistributedDataParallel's default (Li et al., "PyTorch Distributed", VLDB 2020)."""


class Reducer:
    """Sums the gradients of all trainers; each contributes its own micro-batches, weighted by their shares.

    Not DistributedDataParallel, because a step has several backward passes, each through one branch of the batch norms:
    in the last one the other branch's parameters get no gradient, for which DDP would search the graph after every
    forward pass (``find_unused_parameters``); DDP averages, but shares must be summed; and it wraps the network, so
    that an attack's forward pass would take part. Here hooks count the gradients of each parameter, and the last one,
    which the method announces, completes a bucket. Buckets are sent in the same order on all ranks. The parameters of
    mixture batch norms, few and not all reached by the last backward pass, are sent after it.

    Where steps are captured, nothing is sent during a backward pass: all buckets are summed between two graphs, after
    batch norm's statistics. All ranks must do so, as all must send the same messages in the same order.

    Args:
        model: its parameters' ``.grad`` are summed.
        group: the trainers' process group.
        bucket_bytes: size at which a bucket is closed.
    """

    def __init__(self, model: nn.Module, group: Any, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.group = group
        norms = [module for module in model.modules() if isinstance(module, MixtureBatchNorm)]
        of_branches = {p for norm in norms for p in norm.parameters()}
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        # Gradients arrive in roughly the reverse order of the layers.
        early = _buckets([p for p in reversed(self.names) if p not in of_branches], bucket_bytes)
        self.buckets = early + _buckets([p for p in self.names if p in of_branches], bucket_bytes)
        self.homes = {p: bucket for bucket in early for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self.homes]
        self.expected = self.sent = 0
        self.is_aside = self.is_complete = False
        self.counts: dict[Tensor, int] = {}
        self._presence: dict[tuple[bool, ...], Tensor] = {}

    def begin(self, expected: int) -> None:
        """Before a step's first backward pass: how many gradients each parameter will get on this rank; 0: unknown."""
        self.expected, self.sent, self.counts = expected, 0, dict.fromkeys(self.homes, 0)
        self.is_complete = False
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self, losses: Losses, check: bool) -> Losses:
        """Complete each parameter's gradient of the whole step; returns the step's losses.

        Args:
            losses: this rank's shares.
            check: whether to compare which parameters have a gradient; the same on all ranks. Synchronises host and
                device, except in a step that is being captured, where only the others learn of it.

        Raises:
            RuntimeError: a parameter has a gradient on some ranks only.
        """
        shares = [losses.clean] if losses.adversarial is None else [losses.clean, losses.adversarial]
        told = torch.stack(shares)
        if check:
            told = torch.cat([told, self._present(like=told)])
        self.reduce(told)
        if check and not is_captured():
            self._require_agreement(told[len(shares) :].tolist())
        return Losses(told[0], None if losses.adversarial is None else told[1])

    def reduce(self, told: Tensor | None = None) -> None:
        """Send the remaining buckets unless all is complete, wait, and store the sums in ``.grad``.

        Args:
            told: summed too.
        """
        buckets = [] if self.is_complete else self.buckets
        rest = buckets[self.sent :]
        for bucket in rest:
            bucket.fill()
        outside(partial(self._sum, buckets, rest, told))
        self.sent = len(self.buckets)
        for bucket in buckets:
            bucket.empty()

    def _sum(self, buckets: Sequence["_Bucket"], unsent: Sequence["_Bucket"], told: Tensor | None) -> None:
        for bucket in unsent:
            bucket.send(self.group)
        if told is not None:
            dist.all_reduce(told, group=self.group)
        for bucket in buckets:
            bucket.wait()

    def _present(self, like: Tensor) -> Tensor:
        """1 for each parameter that has a gradient, else 0."""
        flags = tuple([p.grad is not None for p in self.names])
        if flags not in self._presence:  # kept, as a captured step cannot make a tensor of the host's numbers
            self._presence[flags] = like.new_tensor(flags)
        return self._presence[flags]

    def _accumulated(self, parameter: Tensor) -> None:
        if self.is_aside:
            return
        self.counts[parameter] += 1
        if self.counts[parameter] != self.expected:
            if 0 < self.expected < self.counts[parameter]:
                raise RuntimeError(
                    f"the method announced {self.expected} backward passes but ran more "
                    f"(seen at {self.names[parameter]}); correct its Method.passes"
                )
            return
        self.homes[parameter].missing -= 1
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self._send_next()

    def _send_next(self) -> None:
        self.buckets[self.sent].fill()
        self.buckets[self.sent].send(self.group)
        self.sent += 1

    def _require_agreement(self, counts: list[float]) -> None:
        ranks = dist.get_world_size(self.group)
        for name, count in zip(self.names.values(), counts, strict=True):
            if 0 < count < ranks:
                raise RuntimeError(
                    f"{name} has a gradient on {count:.0f} of {ranks} ranks; allowed: on all or none"
                )


class Shared(Gradients):
    """A method's access to gradients that the trainers compute together.

    Args:
        reducer: of the run.
        ranks: of the run.
        spread: whether each trainer has a slice of every micro-batch.
    """

    def __init__(self, reducer: Reducer, ranks: Ranks, spread: bool) -> None:
        self.reducer, self._ranks, self.spread = reducer, ranks, spread
        self.rank, self.ranks = ranks.number, ranks.trainers

    @contextmanager
    def summed(self) -> Iterator[None]:
        self.reducer.begin(self.reducer.expected)
        yield
        self.reducer.reduce()
        self.reducer.begin(self.reducer.expected)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.reducer.is_aside = True
        try:
            yield
        finally:
            self.reducer.is_aside = False

    def is_complete(self) -> None:
        self.reducer.is_complete = True

    def sum(self, value: float) -> float:
        return self._ranks.sum(value)


class _Bucket:
    """Parameters of one dtype and device, and a contiguous buffer for their gradients."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        parts = self.flat.split([p.numel() for p in parameters])
        self.views = [_laid_out(part, p) for part, p in zip(parts, parameters, strict=True)]
        self.missing = len(parameters)
        self.work: Any = None

    def fill(self) -> None:
        """Copy the gradients into the buffer."""
        pairs = self._pairs()
        if len(pairs) < len(self.views):
            self.flat.zero_()
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])

    def send(self, group: Any) -> None:
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def wait(self) -> None:
        self.work.wait()

    def empty(self) -> None:
        """Copy the sums into the gradients."""
        if pairs := self._pairs():
            torch._foreach_copy_([gradient for _, gradient in pairs], [view for view, _ in pairs])

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        both = zip(self.views, self.parameters, strict=True)
        return [(view, p.grad) for view, p in both if p.grad is not None]


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """A view of contiguous numbers with a tensor's shape and memory format, so that copies are contiguous."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(like.shape, like.stride())
    return part.view(like.shape)


def _buckets(parameters: list[Tensor], limit: int) -> list[_Bucket]:
    """Consecutive parameters in buckets of at least ``limit`` bytes; a new one starts where dtype or device changes."""
    cut: list[list[Tensor]] = []
    size = limit
    for parameter in parameters:
        alike = bool(cut) and (cut[-1][0].dtype, cut[-1][0].device) == (parameter.dtype, parameter.device)
        if size >= limit or not alike:
            cut.append([])
            size = 0
        cut[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return [_Bucket(some) for some in cut]
