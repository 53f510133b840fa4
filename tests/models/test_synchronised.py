"""Averages over ranks: right for uneven ranks, and few launches however many norms there are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conadv_lab.models import synchronised

# (count, tensors) of three norms on this rank; the other rank has other counts.
OURS, THEIRS = (2, 2, 1), (1, 1, 3)
SIZES = (3, 5, 4)


class Launches(TorchDispatchMode):
    """How many operators were called that make the device compute: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def averages(counts, seed: int, norms: int = 3) -> list:
    draw = torch.Generator().manual_seed(seed)
    return [
        (counts[i % 3], [torch.randn(SIZES[i % 3], generator=draw, dtype=torch.float64) for _ in range(2)])
        for i in range(norms)
    ]


def reduced_with(other: list):
    """Stands for an all-reduce with a rank that has ``other``: what it would send is made by the same code."""

    def all_reduce(sums: torch.Tensor, group: object = None) -> None:
        flat = [count * t for count, some in other for t in some]
        weights = [torch.full_like(t, count) for count, some in other for t in some]
        sums += torch.cat(flat + weights)

    return all_reduce


def test_each_average_weighs_as_many_parts_as_it_has(monkeypatch):
    ours, theirs = averages(OURS, 0), averages(THEIRS, 1)
    expected = [
        (a * t + b * u) / (a + b)
        for (a, some), (b, others) in zip(ours, theirs, strict=True)
        for t, u in zip(some, others, strict=True)
    ]
    monkeypatch.setattr(synchronised.dist, "all_reduce", reduced_with(theirs))
    synchronised.average_over_ranks(ours, None)
    for tensor, right in zip([t for _, some in ours for t in some], expected, strict=True):
        torch.testing.assert_close(tensor, right, rtol=1e-15, atol=0)


@pytest.mark.parametrize("norms", [3, 60])
def test_the_number_of_launches_does_not_grow_with_that_of_norms(norms, monkeypatch):
    monkeypatch.setattr(synchronised.dist, "all_reduce", lambda sums, group: None)
    of_this_rank = [(2, some) for _, some in averages(OURS, 0, norms)]
    with Launches() as launches:
        synchronised.average_over_ranks(of_this_rank, None)
    assert launches.count <= 8
