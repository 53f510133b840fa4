"""Random generators made from a run's seed and a name, so that nothing depends on shared state."""

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on ``seed`` and every name.

    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 2)
    False
    """
    text = ":".join(str(part) for part in (seed, *names))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: object) -> "torch.Generator":
    """A separate CPU generator for ``names``."""
    import torch

    return torch.Generator().manual_seed(derived_seed(seed, *names))
