"""What outlives the activations lies beside the heap, and is the same."""

import gc
import re
from pathlib import Path

import pytest
import torch

from conadv_lab.mapped import LEAST_BYTES, beside_the_heap, mapped_bytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool])
def test_a_copy_that_is_the_same(dtype):
    kept = torch.randint(2, (64, 3, 128), generator=torch.Generator().manual_seed(0)).to(dtype)
    apart = beside_the_heap(kept)
    assert torch.equal(apart, kept)
    assert apart.dtype == dtype
    assert apart.data_ptr() != kept.data_ptr()


def test_small_ones_stay_where_they_are():
    kept = torch.zeros(LEAST_BYTES - 1, dtype=torch.uint8)
    assert beside_the_heap(kept) is kept


def heap(name: str = "[heap]") -> tuple[int, int]:
    found = re.search(
        rf"^(\w+)-(\w+) .*{re.escape(name)}$", Path("/proc/self/maps").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1], 16), int(found[2], 16)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
def test_it_lies_beside_the_heap_and_is_given_back():
    apart = beside_the_heap(torch.ones(LEAST_BYTES, dtype=torch.uint8))
    first, last = heap()
    place = apart.data_ptr()
    assert not first <= place < last

    def mapped() -> bool:
        ranges = re.findall(r"^(\w+)-(\w+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
        return any(int(low, 16) <= place < int(high, 16) for low, high in ranges)

    assert mapped()
    huge = mapped_bytes(1 << 34)  # 16 GiB of address space, no memory
    assert not huge[:1].any()
    place = huge.data_ptr() + (1 << 33)
    assert mapped()
    del huge
    gc.collect()
    assert not mapped()
