"""CIFAR-10 in the official binary layout whose first images can be learnt; the others are black, and take no disk."""

from pathlib import Path

import numpy as np

COUNT, RECORD = 300, 1 + 3 * 32 * 32


def write_small_cifar(root: Path) -> Path:
    """Write it below ``root``, which is returned: in each file ``COUNT`` noisy images of ten patterns."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    patterns = draw.integers(0, 256, (10, RECORD - 1))
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels = draw.integers(0, 10, COUNT)
        noise = draw.integers(0, 256, (COUNT, RECORD - 1))
        pixels = (patterns[labels] + noise) // 2
        with (folder / name).open("wb") as file:
            file.write(np.hstack([labels[:, None], pixels]).astype(np.uint8).tobytes())
            file.truncate(10_000 * RECORD)  # a hole, which is read as zeros
    return root
