"""The ranks of a run: who trains, who attacks, and the few things that they tell one another outside a gradient.

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

# Not public, but the one way: torchtitan sets its timeouts after the first step so too (distributed/utils.py).
from torch.distributed.distributed_c10d import _set_pg_timeout

from conadv_lab.config import Config
from conadv_lab.runs import RunFolder

PATIENCE = timedelta(seconds=50)
"""How long a rank waits within a step for another one that lives but does not answer."""
FIRST_PATIENCE = timedelta(hours=1)
"""The same in a process's first steps, in which ranks compile and try out convolutions, each as long as it takes."""
LONG_PATIENCE = timedelta(days=1)
"""How long ranks wait for one that loads, evaluates or saves; one that dies is noticed at once."""
SENTENCE_BYTES = 2048


class AnotherRankFailed(RuntimeError):
    """A rank is gone or does not answer; it has told why itself, unless it was killed."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run: the first ones train, the last ``attackers`` only attack.

    Attributes:
        number: of this rank.
        count: of all ranks.
        attackers: how many of them only attack.
        local: number of this rank on its node, which picks its GPU.
        owned: whether torch.distributed was initialised for this run, to be left with it.
        training: process group of the trainers.
        patient: process group of all ranks, on the CPU, that waits long.
        judging: the same of the trainers, who share an evaluation.
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
        """Whether the flag is up on any rank; all ranks must ask."""
        if self.count == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.uint8, device="cpu")
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.patient)
        return bool(told)

    def wait(self) -> None:
        """Return once all ranks are here, however long one of them evaluates or saves."""
        self.any(False)

    def expect_answers(self) -> None:
        """From here on ranks wait within a step for `PATIENCE` only; all ranks must come here."""
        if self.count == 1:
            return
        self.wait()  # a rank that is still in an earlier step must not be waited for with the new patience
        for group in (self.training, self.weights):
            if group is not None and group != dist.GroupMember.NON_GROUP_MEMBER:
                _set_pg_timeout(PATIENCE, group)

    def told_by_first(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        if self.count == 1:
            return number
        told = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.broadcast(told, src=0, group=self.patient)
        return int(told)

    @torch.no_grad()
    def take_from_first(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with rank 0's; all ranks must ask."""
        if self.count > 1:
            told = tensor.detach().cpu()
            dist.broadcast(told, src=0, group=self.patient)
            tensor.copy_(told)

    def sum(self, value: float) -> float:
        """The sum of all trainers' values; all of them must ask."""
        if self.trainers == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device="cpu")
        dist.all_reduce(told, group=self.training)
        return float(told)

    def filled(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, …) rows on the host of which each trainer has made those that are its own, number by number in turn.

        The others are zero, so that adding them changes no bit; all trainers must ask.

        >>> ALONE.filled(torch.ones(2, 3)).sum().item()
        6.0
        """
        if self.trainers > 1:
            dist.all_reduce(rows, group=self.judging)
        return rows

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A mistake that one rank finds inside is raised on all; also, nobody leaves before all have come.

        Raises:
            ValueError: the lowest such rank's, on every rank.
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

    def require_own_gpus(self, device: torch.device) -> None:
        """Where ranks compute on GPUs each has one of its own: NCCL serves no two on one. All ranks must ask.

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
                    f"ranks {gpus.index(gpu)} and {rank} are on one GPU; allowed: at most {len(set(gpus))} ranks "
                    "here, one a GPU, or device cpu"
                )

    def _all_told(self, sentence: bytes) -> list[str]:
        """What each rank says, on all ranks."""
        mine = torch.zeros(SENTENCE_BYTES, dtype=torch.uint8, device="cpu")
        mine[: len(sentence)] = torch.tensor(list(sentence), dtype=torch.uint8, device="cpu")
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine, group=self.patient)
        return [bytes(told.tolist()).rstrip(b"\0").decode(errors="replace") for told in all_of_them]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, as where it downloads what they then find."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first and self.count > 1:
                self.wait()

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """An error of the transport becomes `AnotherRankFailed`.

        Raises:
            AnotherRankFailed: a rank is gone or does not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _of_the_transport(error):
                raise
            first_line = str(error).splitlines()[0]
            raise AnotherRankFailed(
                f"rank {self.number} ends because another rank has failed or does not answer ({first_line})"
            ) from error

    def leave(self) -> None:
        """Forget torch.distributed, where this run initialised it."""
        if self.owned and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


class AnyLater:
    """Whether a flag was up on any rank, told one call later: no rank waits for a message within a step.

    All ranks must call `told` after the same steps, so that all are told the same. One rank alone is told at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._asked: tuple[Any, torch.Tensor] | None = None

    def told(self, flag: bool, more: bool) -> bool:
        """Whether the flag was up on any rank at the call before.

        Args:
            flag: this rank's, which all are told at the next call.
            more: whether there will be a next call unless the answer is yes: no question is left without an answer.
        """
        if self.ranks.count == 1:
            return flag
        asked, self._asked = self._asked, None
        if asked is not None:
            work, answer = asked
            work.wait()
            if answer.item():
                return True
        if more:
            answer = torch.tensor([flag], dtype=torch.uint8, device="cpu")
            work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.ranks.patient, async_op=True)
            self._asked = work, answer
        return False


def join(config: Config) -> Ranks:
    """Meet the other ranks that torchrun's environment tells of: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    Raises:
        ValueError: a broken environment, or attackers that leave nobody to train.
    """
    attackers = config.method.attackers
    count = dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)
    require_trainers(attackers, count)
    if count == 1:
        return ALONE
    owned = not dist.is_initialized()
    if owned:
        # CPU tensors go over gloo where GPUs talk over NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"WORLD_SIZE is {count}, but {name} is not set; torchrun sets both")
        with Ranks(_number("RANK", 0), count).failures_told():
            dist.init_process_group(backend, timeout=PATIENCE, **_meeting(count))
    trainers = list(range(count - attackers))
    # All ranks make all groups, in one order.
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
    """Raise ``ValueError`` where the attackers among ``count`` ranks leave nobody to train."""
    if attackers and attackers >= count:
        raise ValueError(
            f"attackers is {attackers} of {count} rank{'s' * (count > 1)}; allowed: fewer than there are ranks, "
            "which train --ranks N, torchrun or submit --tasks-per-node start"
        )


class Spectator(RunFolder):
    """The run folder as ranks other than 0 have it: they read it, and what they would write rank 0 writes."""

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
    """How to meet: under torchrun by its agent's store, else by one that rank 0 keeps."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {}
    rank, port = _number("RANK", 0), _number("MASTER_PORT", 0)
    # A client tries twice, so that a rank 0 that never comes would be waited for twice as long as is told.
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
    # gloo raises plain RuntimeErrors that name its own source files, but for a connection that it has given up.
    told = str(error)
    return isinstance(error, dist.DistError) or "gloo" in told or "timeout caused pair closure" in told
