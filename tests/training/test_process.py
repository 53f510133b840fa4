"""A run sets up its own process; measuring and notebooks keep theirs."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from conadv_lab.config import resolved
from conadv_lab.training import process
from conadv_lab.training.build import build
from conadv_lab.training.loop import StoppedOnRequest, train
from conadv_lab.training.restore import restore
from tests.training.test_loop import tiny


@pytest.fixture
def settings():
    """What a process has: another number of threads than any run here, and CUDA's nondeterministic algorithms."""
    torch.set_num_threads(2)
    yield lambda: (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(False)


def test_neither_training_nor_restoring_leaves_anything_set(settings, tmp_path, monkeypatch):
    before = settings()
    inside = []

    def steps(run):
        inside.append(settings())
        raise StoppedOnRequest

    config = tiny(threads=1, deterministic=True, steps=1, warmup_epochs=0)
    with monkeypatch.context() as patch:
        patch.setattr("conadv_lab.training.loop.Run.start", steps)
        with pytest.raises(StoppedOnRequest):
            train(config, tmp_path / "stopped", progress="none")
    assert inside == [(1, True, False)]
    assert settings() == before
    train(config, tmp_path / "run", progress="none")
    assert settings() == before
    restore(tmp_path / "run")
    assert settings() == before


def test_the_default_number_of_threads_is_this_process_share(monkeypatch):
    """Of 8 cores, of which the process has 3; and two ranks of torchrun share those of a node."""
    monkeypatch.setattr(process, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    asked = resolved(tiny(threads=None))
    build(asked)
    assert torch.get_num_threads() == 3
    build(asked.replace(threads=2))
    assert torch.get_num_threads() == 2


FAULTS = """
import resource, torch
from conadv_lab.training import process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        [torch.ones(2 << 20) for _ in range(20)]  # 160 MB, in blocks that the heap holds
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

process.keep_freed_memory(-1)
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_waits_for_the_next_one():
    """A page of 4 KiB that was given back to the system is a fault: 41,000 of them for 160 MB, three times."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert int(said) < 20_000


def test_freed_memory_is_kept_on_a_cpu_until_training_ends(monkeypatch, tmp_path):
    limits: list[int] = []
    monkeypatch.setattr(process, "keep_freed_memory", limits.append)
    train(tiny(steps=1, warmup_epochs=0), tmp_path / "run", progress="none")
    assert limits == [-1, 2 * process.LARGE]
