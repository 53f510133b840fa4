"""What ranks find out about one another before they begin, and between steps; ranks that train are in test_ranks."""

from types import SimpleNamespace

import pytest
import torch

from conadv_lab.training import distributed
from conadv_lab.training.distributed import ALONE, AnyLater, Ranks


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (["a", "b", "c"], None),
        (["", "", ""], None),  # on CPUs
        (
            ["a", "b", "a"],
            "ranks 0 and 2 share one GPU; allowed: at most 2 ranks here, one per GPU, or device cpu",
        ),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(gpus, message, monkeypatch):
    monkeypatch.setattr(Ranks, "_all_told", lambda self, mine: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    device = torch.device("cuda:0" if gpus[0] else "cpu")
    if message is None:
        Ranks(0, 3).require_own_gpus(device)
    else:
        with pytest.raises(ValueError, match=message):
            Ranks(0, 3).require_own_gpus(device)


def test_one_rank_asks_nobody():
    ALONE.require_own_gpus(torch.device("cuda:0"))


class Sent:
    """An all-reduce under way with a rank whose flag is up; it notes what is done in which order."""

    def __init__(self, said: list[str], answer: torch.Tensor) -> None:
        self.said, self.answer = said, answer
        said.append("asked")

    def wait(self) -> None:
        self.said.append("answered")
        self.answer.fill_(1)


def test_no_rank_waits_for_a_flag_in_the_step_in_which_it_is_sent(monkeypatch):
    said: list[str] = []

    def all_reduce(answer, op, group, async_op=False):
        assert async_op, "the step waits for the slowest rank"
        return Sent(said, answer)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    later = AnyLater(Ranks(0, 2))
    assert later.told(False, more=True) == (False,)
    assert said == ["asked"]
    assert later.told(False, more=True) == (True,), "the other rank's flag is told a call later"
    assert said == ["asked", "answered"], "nothing more is asked once the answer is to stop"
    assert later.told(True, more=False) == (False,), "no question is left open at the end"
    assert said == ["asked", "answered"]


def test_one_rank_is_told_its_own_flag_at_once():
    assert AnyLater(ALONE).told(True, False, more=True) == (True, False)
