"""A method's state goes through a checkpoint over ranks: shared by all, or each rank's own."""

import pytest
import torch

from conadv_lab.data.loader import Split, Stream
from conadv_lab.methods.base import Vanilla
from conadv_lab.training import pending
from conadv_lab.training.distributed import ALONE, Ranks
from tests.conftest import image_set


class Keeps(Vanilla):
    """Keeps one tensor a parameter, and one of its own rank's images."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self):
        return {
            "shared": [torch.ones(3)],
            "own": {"gradient": [torch.full((2,), self.rank), torch.zeros(1)], "step": 4},
        }


def saved(ranks: int, monkeypatch) -> dict:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(pending.dist, "send", lambda tensor, dst, group: sent.append(tensor))
    monkeypatch.setattr(pending.dist, "recv", lambda into, src, group: into.copy_(sent.pop(0)))
    own = [pending.gatherable_state(Keeps(r)) for r in range(ranks)]
    states = [pending.gathered_state(own[r], None, Ranks(r, ranks), 5) for r in reversed(range(ranks))]
    return states[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_each_trainer_gets_its_own_back(count, monkeypatch):
    state = saved(count, monkeypatch)
    for rank in range(count):
        own = pending.scattered_state(state, None, Ranks(rank, count), 5)
        expected = Keeps(rank).state_dict()
        torch.testing.assert_close(own, expected)


def test_another_number_of_ranks_is_refused(monkeypatch):
    state = saved(2, monkeypatch)
    with pytest.raises(ValueError, match=r"ranks that train is 1; allowed: 2, as the checkpoint has"):
        pending.scattered_state(state, None, ALONE, 5)


def test_state_that_says_nothing_of_ranks_is_refused():
    method = Keeps(0)
    method.state_dict = lambda: {"shadow": []}
    with pytest.raises(ValueError, match=r"Keeps keeps 'shadow'; allowed: 'pending', 'shared', 'own'"):
        pending.gatherable_state(method)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_perturbations_are_sent_one_micro_batch_after_another(count, spread, monkeypatch):
    """30 images in groups of 8, 8, 8 and 6: rank 0 gets them in the order of places, and nobody sends more at once."""
    sent: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(count)}
    monkeypatch.setattr(pending.dist, "send", lambda tensor, dst, group: sent[rank].append(tensor))
    monkeypatch.setattr(pending.dist, "recv", lambda into, src, group: into.copy_(sent[src].pop(0)))
    bits = torch.arange(60).view(30, 2)
    for rank in reversed(range(count)):
        split = Split(rank, count, spread)
        stream = Stream(image_set(50), seed=0, batch=30, steps=3, micro_batch=8, split=split)
        own = [bits[first - 30 : last - 30] for first, last in stream.own_spans(1)]
        gathered = pending.gathered_state({"pending": {1: own}}, stream, Ranks(rank, count), 1)
        assert max((len(piece) for piece in sent[rank]), default=0) <= 8
    assert not any(sent.values())
    assert [len(group) for group in gathered["pending"][1]] == [8, 8, 8, 6]
    assert torch.equal(torch.cat(gathered["pending"][1]), bits)
