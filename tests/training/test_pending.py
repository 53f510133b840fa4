"""A method's state goes through a checkpoint over ranks: shared by all, or each rank's own."""

from dataclasses import replace

import pytest
import torch

from conadv_lab.methods.base import Vanilla
from conadv_lab.training import pending
from conadv_lab.training.distributed import ALONE, Ranks


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
    monkeypatch.setattr(pending.dist, "send", lambda tensor, dst: sent.append(tensor))
    monkeypatch.setattr(pending.dist, "recv", lambda into, src: into.copy_(sent.pop(0)))
    states = [pending.gathered_state(Keeps(r), None, Ranks(r, ranks), 5) for r in reversed(range(ranks))]
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
        pending.gathered_state(method, None, replace(ALONE), 5)
