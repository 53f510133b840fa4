"""The ranks of a run: which train, which attack, and all communication besides gradients.

A run of one rank never touches torch.distributed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Not public, but the only way: torchtitan also sets its timeouts like this (distributed/utils.py).
from torch.distributed.distributed_c10d import _set_pg_timeout

from conadv_lab.config import Config
from conadv_lab.mistakes import counted
from conadv_lab.runs import RunFolder

PATIENCE = timedelta(seconds=50)
"""How long a rank waits within a step for another one that is alive but does not answer."""
FIRST_PATIENCE = timedelta(hours=1)
"""The same in a process's first steps, when ranks compile and benchmark convolutions for unpredictable times."""
LONG_PATIENCE = timedelta(days=1)
"""How long ranks wait for one that loads, evaluates or saves; one that dies is noticed at once."""
SENTENCE_BYTES = 2048


class AnotherRankFailed(RuntimeError):
    """Another rank has died or does not answer; it has reported why itself, unless it was killed."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run: the first ones train, the last ``attackers`` only attack.

    Attributes:
        number: of this rank.
        count: of all ranks.
        attackers: how many of them only attack.
        local: number of this rank on its node, which picks its GPU.
        owned: whether this run initialised torch.distributed, and has to shut it down.
        training: process group of the trainers.
        patient: CPU process group of all ranks, with a long timeout.
        judging: the same for the trainers, which share an evaluation.
        weights: process group of rank 0 and the attackers.
    """

    number: int = 0
    count: int = 1
    attackers: int = 0
    local: int = 0
    owned: bool = False
    training: Any = None
    patient: Any = None
    judging: Any = None
    weights: Any = None

    @property
    def trainers(self) -> int:
        return self.count - self.attackers

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def trains(self) -> bool:
        return self.number < self.trainers

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a collective call of all ranks."""
        if self.count == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.uint8, device="cpu")
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.patient)
        return bool(told)

    def wait(self) -> None:
        """A barrier of all ranks, which waits however long one of them evaluates or saves."""
        self.any(False)

    def expect_answers(self) -> None:
        """From here on ranks wait only `PATIENCE` within a step; a collective call of all ranks."""
        if self.count == 1:
            return
        self.wait()  # the new timeout must not apply to a rank that is still in an earlier step
        for group in (self.training, self.weights):
            if group is not None and group != dist.GroupMember.NON_GROUP_MEMBER:
                _set_pg_timeout(PATIENCE, group)

    def told_by_first(self, number: int) -> int:
        """Broadcast rank 0's number to all ranks."""
        if self.count == 1:
            return number
        told = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.broadcast(told, src=0, group=self.patient)
        return int(told)

    @torch.no_grad()
    def take_from_first(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with rank 0's; a collective call of all ranks."""
        if self.count > 1:
            told = tensor.detach().cpu()
            dist.broadcast(told, src=0, group=self.patient)
            tensor.copy_(told)

    def sum(self, value: float) -> float:
        """The sum over all trainers; a collective call of all trainers."""
        if self.trainers == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device="cpu")
        dist.all_reduce(told, group=self.training)
        return float(told)

    def filled(self, rows: torch.Tensor) -> torch.Tensor:
        """Complete (n, …) rows on the host, of which trainer r filled rows r, r + trainers, … and left the rest zero.

        Adding zeros changes no bit. A collective call of all trainers.

        >>> ALONE.filled(torch.ones(2, 3)).sum().item()
        6.0
        """
        if self.trainers > 1:
            dist.all_reduce(rows, group=self.judging)
        return rows

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise a ``ValueError`` from inside the block on all ranks, if any rank raises one; also a barrier.

        Raises:
            ValueError: that of the lowest failing rank, on every rank.
        """
        if self.count == 1:
            yield
            return
        sentence = b""
        try:
            yield
        except ValueError as mistake:
            sentence = str(mistake).encode()[:SENTENCE_BYTES] or b"?"
        for told in self._all_told(sentence):
            if told:
                raise ValueError(told)

    def first_reason(self, reason: str | None) -> str | None:
        """The reason of the lowest rank that has one; a collective call of all ranks."""
        if self.count == 1:
            return reason
        told = self._all_told((reason or "").encode()[:SENTENCE_BYTES])
        return next((one for one in told if one), None)

    def require_own_gpus(self, device: torch.device) -> None:
        """Check that ranks on GPUs have one each, as NCCL requires; a collective call of all ranks.

        Raises:
            ValueError: two ranks share a GPU.
        """
        if self.count == 1:
            return
        mine = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        gpus = self._all_told(mine.encode())
        for rank, gpu in enumerate(gpus):
            if gpu and gpu in gpus[:rank]:
                raise ValueError(
                    f"ranks {gpus.index(gpu)} and {rank} share one GPU; allowed: at most {len(set(gpus))} ranks "
                    "here, one per GPU, or device cpu"
                )

    def _all_told(self, sentence: bytes) -> list[str]:
        """Gather every rank's sentence on all ranks."""
        mine = torch.zeros(SENTENCE_BYTES, dtype=torch.uint8, device="cpu")
        mine[: len(sentence)] = torch.tensor(list(sentence), dtype=torch.uint8, device="cpu")
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine, group=self.patient)
        return [bytes(told.tolist()).rstrip(b"\0").decode(errors="replace") for told in all_of_them]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others, for example to download what they then find."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first and self.count > 1:
                self.wait()

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Turn communication errors into `AnotherRankFailed`.

        Raises:
            AnotherRankFailed: a rank has died or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _of_the_transport(error):
                raise
            first_line = str(error).splitlines()[0]
            raise AnotherRankFailed(
                f"rank {self.number} stops because another rank has failed or does not answer ({first_line})"
            ) from error

    def leave(self) -> None:
        """Shut down torch.distributed if this run initialised it."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


class AnyLater:
    """Which flags were set on any rank, reported one call later, so that no rank waits for a message within a step.

    All ranks must call `told` after the same steps, so that all get the same answer. A single rank gets it at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._asked: tuple[Any, torch.Tensor] | None = None

    def told(self, *flags: bool, more: bool) -> tuple[bool, ...]:
        """Which of the flags were set on any rank at the previous call; the first flag is a request to stop.

        Args:
            flags: this rank's, reported to all at the next call.
            more: whether there will be a next call unless the answer is to stop; if not, no message is left pending.
        """
        if self.ranks.count == 1:
            return flags
        asked, self._asked = self._asked, None
        answers = (False,) * len(flags)
        if asked is not None:
            work, told = asked
            work.wait()
            answers = tuple(bool(flag) for flag in told.tolist())
        if more and not answers[0]:
            told = torch.tensor(flags, dtype=torch.uint8, device="cpu")
            work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.ranks.patient, async_op=True)
            self._asked = work, told
        return answers


def join(config: Config) -> Ranks:
    """Connect to the other ranks given by torchrun's environment: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    Raises:
        ValueError: a broken environment, or attackers that leave no rank to train.
    """
    attackers = config.method.attackers
    count = dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)
    require_trainers(attackers, count)
    if count == 1:
        return ALONE
    owned = not dist.is_initialized()
    if owned:
        # With NCCL for GPUs, CPU tensors still need gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"WORLD_SIZE is {count}, but {name} is not set; torchrun sets both")
        with Ranks(_number("RANK", 0), count).failures_told():
            dist.init_process_group(backend, timeout=PATIENCE, **_meeting(count))
    trainers = list(range(count - attackers))
    # All ranks must create all groups in the same order.
    patient = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
    return Ranks(
        number=dist.get_rank(),
        count=count,
        attackers=attackers,
        local=_number("LOCAL_RANK", dist.get_rank()),
        owned=owned,
        patient=patient,
        judging=dist.new_group(trainers, backend="gloo", timeout=LONG_PATIENCE) if attackers else patient,
        training=dist.new_group(trainers, timeout=FIRST_PATIENCE),
        weights=dist.new_group([0, *range(len(trainers), count)], timeout=FIRST_PATIENCE)
        if attackers
        else None,
    )


def require_trainers(attackers: int, count: int) -> None:
    """Raise ``ValueError`` if the attackers among ``count`` ranks leave no rank to train."""
    if attackers and attackers >= count:
        raise ValueError(
            f"attackers is {attackers} of {counted(count, 'rank')}; allowed: fewer than the number of ranks, "
            "which train --ranks N, torchrun or submit --tasks-per-node sets"
        )


class Spectator(RunFolder):
    """The run folder for ranks other than 0: they read it and leave all writing to rank 0."""

    def create(self, config: Config, manifest: dict[str, Any]) -> None:
        pass

    def clear_leftovers(self) -> None:
        pass

    def note_config(self, config: Config) -> None:
        pass

    def append_metrics(self, line: dict[str, Any]) -> None:
        pass

    def save_checkpoint(self, step: int, state: dict[str, Any], metrics_bytes: int | None = None) -> Path:
        return self.checkpoints

    def cut_metrics(self, size: int) -> None:
        pass


def _meeting(count: int) -> dict[str, Any]:
    """How to rendezvous: under torchrun through its agent's store, else through one that rank 0 keeps."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {}
    rank, port = _number("RANK", 0), _number("MASTER_PORT", 0)
    # A client tries twice, so it would wait for a missing rank 0 twice as long as the timeout.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], port, count, rank == 0, PATIENCE / 2, wait_for_workers=False
    )
    store.set_timeout(PATIENCE)
    return {"store": store, "rank": rank, "world_size": count}


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise ValueError(f"{name} is {value!r} in the environment; allowed: a whole number of at least 0")
    return int(value)


def _of_the_transport(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that name its source files, except when it gives up a connection.
    told = str(error)
    return isinstance(error, dist.DistError) or "gloo" in told or "timeout caused pair closure" in told
