"""What ranks find out about one another before they begin; ranks that train are in test_ranks."""

from types import SimpleNamespace

import pytest
import torch

from conadv_lab.training.distributed import ALONE, Ranks


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (["a", "b", "c"], None),
        (["", "", ""], None),  # on CPUs
        (
            ["a", "b", "a"],
            "ranks 0 and 2 are on one GPU; allowed: at most 2 ranks here, one a GPU, or device cpu",
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
