"""What a run sets for its whole process, and how it is put back where the process is somebody else's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conadv_lab.config import Config
from conadv_lab.cores import cores
from conadv_lab.training.distributed import Ranks


def settle(config: Config, ranks: Ranks, device: torch.device) -> None:
    """Threads, deterministic algorithms and the search for fast convolutions, as a resolved config asks for."""
    neighbours = min(ranks.count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(config.training.threads or max(1, cores() // neighbours))
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # All micro-batches have one shape, so it pays to look for the fastest convolutions once.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.training.deterministic


@contextmanager
def put_back() -> Iterator[None]:
    """Undo on leaving what `settle` did inside, as the process may be a notebook's."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
