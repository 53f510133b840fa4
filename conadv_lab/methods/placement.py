"""Runs ConAdv's attack on dedicated ranks.

Every placement attacks with the weights and running statistics at the start of the step, so all give the same
parameters.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conadv_lab.data.loader import Span, Split, Step, Stream
from conadv_lab.data.transfer import sent
from conadv_lab.methods.attack import Attack
from conadv_lab.methods.families.conadv import Placement
from conadv_lab.methods.forwards import Criterion
from conadv_lab.models.norm import adversarial_updates, note_updates


class Elsewhere(Placement):
    """The attack runs on other ranks: pending results are not in this device's slots, and no step can be captured."""

    here = False

    def __init__(self) -> None:
        self.made: dict[int, list[Any]] = {}
        self.sending: list[tuple[Any, Tensor]] = []

    def begin(self, step: Step, pending: dict[int, list[Any]], staleness: int) -> dict[int, list[Any]]:
        self.made = pending
        return pending

    def move_up(self) -> None:
        """Nothing to move: every step has new tensors."""

    def end(self, step: Step, pending: Sequence[int]) -> dict[int, list[Any]]:
        return {number: self.made[number] for number in pending if number > step.number}


class OtherRanks(Elsewhere):
    """A trainer's side when some ranks only attack; `Attacker` is the other side.

    At the start of a step the first trainer sends weights and statistics to the attackers and continues; attacker a
    attacks whole groups a, a + attackers, … and sends each trainer the results for its micro-batches as bytes through
    the CPU: one bit per pixel is little data, and it never waits behind a gradient on the device.

    Args:
        stream: this rank's.
        trainers, attackers: how many; ranks 0 to trainers - 1 train.
        weights: the process group of rank 0 and the attackers.
        patience: how long to wait for an attacker.
    """

    def __init__(
        self, stream: Stream, trainers: int, attackers: int, weights: Any, patience: timedelta
    ) -> None:
        super().__init__()
        self.patience = patience
        self.stream, self.trainers, self.attackers, self.weights = stream, trainers, attackers, weights
        self.device = torch.device("cpu")

    def attack(
        self, attack: Attack, model: nn.Module, step: Step, criterion: Criterion, wanted: Sequence[int]
    ) -> dict[int, list[Any]]:
        parameter = next(model.parameters())
        self.device = parameter.device
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        if self.stream.split.rank == 0:
            # Send the number of updates too: reading it from its buffer would synchronise with the device.
            count = torch.tensor([adversarial_updates(model) or 0], device="cpu")
            for told in (count, packed_state(model)):
                work = dist.broadcast(told, src=0, group=self.weights, async_op=True)
                self.sending.append((work, told))
        made = {
            number: [self._expected(attack, number, *place) for place in self._places(number)]
            for number in wanted
        }
        self.made |= made
        return made

    def taken(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        work, received = kept
        work.wait(self.patience)  # the group's own timeout is that of its creation
        return sent(received, self.device)

    def _places(self, number: int) -> list[tuple[int, Span]]:
        """(global group, piece) of each of this rank's micro-batches."""
        groups, split = self.stream.groups(number), self.stream.split
        first, apart = (0, 1) if split.spread else (split.rank, split.ranks)
        return [(first + i * apart, piece) for i, piece in enumerate(split.pieces(groups))]

    def _expected(self, attack: Attack, number: int, group: int, piece: Span) -> tuple[Any, Tensor]:
        image = self.stream.image()
        received = attack.space((piece[1] - piece[0], *image.shape), image.dtype)
        attacker = self.trainers + group % self.attackers
        return dist.irecv(received, src=attacker, tag=tag_of(self.stream, number, group)), received


class Attacker(Elsewhere):
    """The side of a rank that only attacks.

    Args:
        stream: this attacker's own, of whole groups.
        trained: how the trainers split a step, seen from each of them.
        weights: the process group of rank 0 and the attackers.
    """

    def __init__(self, stream: Stream, trained: list[Split], weights: Any) -> None:
        super().__init__()
        self.stream, self.trained, self.weights = stream, trained, weights

    def attack(
        self, attack: Attack, model: nn.Module, step: Step, criterion: Criterion, wanted: Sequence[int]
    ) -> dict[int, list[Any]]:
        count, flat = torch.zeros(1, dtype=torch.int64, device="cpu"), packed_state(model)
        for told in (count, flat):
            dist.broadcast(told, src=0, group=self.weights)
        unpack_state(model, flat, int(count))
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        for number in wanted:
            split, groups = self.stream.split, self.stream.groups(number)
            mine = range(split.rank, len(groups), split.ranks)
            for group, batch in zip(mine, step.batches(number - step.number), strict=True):
                kept = attack.perturb(model, batch, criterion).cpu()
                self._send(kept, groups, group, tag_of(self.stream, number, group))
        made: dict[int, list[Any]] = {number: [] for number in wanted}
        self.made |= made
        return made

    def _send(self, kept: Tensor, groups: list[Span], group: int, tag: int) -> None:
        start, stop = groups[group]
        for trainer, split in enumerate(self.trained):
            for first, last in split.pieces(groups):
                if start <= first and last <= stop:
                    rows = kept[first - start : last - start].contiguous()
                    self.sending.append((dist.isend(rows, dst=trainer, tag=tag), rows))


def tag_of(stream: Stream, number: int, group: int) -> int:
    """The tag of a message between two ranks; repeats only after more messages than can be in flight."""
    return (number * len(stream.groups(0)) + group) % (1 << 30)


@torch.no_grad()
def packed_state(model: nn.Module) -> Tensor:
    """All weights and running statistics as concatenated bytes: (total bytes,) uint8."""
    return torch.cat([value.contiguous().view(-1).view(torch.uint8) for value in model.state_dict().values()])


@torch.no_grad()
def unpack_state(model: nn.Module, flat: Tensor, updates: int) -> None:
    """Copy the result of `packed_state` into a model of the same structure.

    Args:
        model: changed in place.
        flat: from `packed_state`.
        updates: that model's `adversarial_updates`, which are in its buffers too, but on the device.
    """
    state = list(model.state_dict().values())
    parts = flat.split([value.numel() * value.element_size() for value in state])
    for value, part in zip(state, parts, strict=True):
        # An unaligned offset cannot be viewed as a wider dtype, so copy the bytes.
        value.copy_(part.clone().view(value.dtype).view(value.shape))
    note_updates(model, updates)
