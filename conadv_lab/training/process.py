"""Process-wide settings of a run, and how to restore the previous ones."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conadv_lab.config import Config
from conadv_lab.cores import cores
from conadv_lab.training.distributed import Ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 32 << 20
"""Largest block in bytes that glibc's heap holds, DEFAULT_MMAP_THRESHOLD_MAX; a larger one is mapped by itself."""


def settle(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Set threads, deterministic algorithms, cuDNN benchmarking and what happens to freed memory, from a config."""
    neighbours = min(ranks.count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(config.training.threads or max(1, cores() // neighbours))
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # All micro-batches have one shape, so benchmarking convolutions once pays off.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.training.deterministic
    if device.type == "cpu":
        keep_freed_memory(-1)


@contextmanager
def put_back() -> Iterator[None]:
    """Restore on exit what `settle` changed inside, as the process may be a notebook's."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        keep_freed_memory(2 * LARGE)


def keep_freed_memory(limit: int) -> None:
    """Let glibc keep up to so many freed bytes; all with -1. Nothing with another C library.

    It would give memory back that a step frees, only to fault it in again in the next step: 11,000 page faults and 4 %
    of a step of ResNet-18 with 16 images on one thread. Setting one limit fixes the other too, which glibc raises to
    ``LARGE`` by itself otherwise, and this one to twice as much.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, limit)
