"""Process-wide settings of a run, and how to restore the previous ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conadv_lab.config import Config
from conadv_lab.cores import cores
from conadv_lab.training.distributed import Ranks


def settle(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Set threads, deterministic algorithms and cuDNN benchmarking from a resolved config."""
    neighbours = min(ranks.count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(config.training.threads or max(1, cores() // neighbours))
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # All micro-batches have one shape, so benchmarking convolutions once pays off.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.training.deterministic


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
