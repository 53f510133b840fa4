"""Full float32 precision: by default a GPU computes convolutions with fewer digits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # whose parts are made as it is imported
GPU = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)
CPU = (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn)
FULL = ("ieee", "none")


@contextmanager
def full_float32() -> Iterator[None]:
    """Context in which float32 products keep 24 bits, instead of TF32's 11 or bfloat16's 8; restores the settings.

    cuDNN uses TF32 for convolutions by default, and ``torch.set_float32_matmul_precision`` allows it elsewhere. A
    Hessian product would then be off by 1e-3, while error bounds assume float32's rounding of 1e-7.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_float32():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.set_float32_matmul_precision("highest")
    """
    places = GPU + CPU if _gpu_in_use() else CPU
    before = [place.fp32_precision for place in places]
    if all(precision in FULL for precision in before):  # already full, for example when nested
        yield
        return
    convolutions = _unless_mixed(lambda: torch.backends.cudnn.allow_tf32, True)
    products = _unless_mixed(torch.get_float32_matmul_precision, "highest")
    try:
        # Set the older switches too, or torch raises an error about mixing both when they are read.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _gpu_in_use() -> bool:
    return torch.cuda.is_initialized()


def _unless_mixed(read: Callable[[], Any], default: Any) -> Any:
    """An older switch's value; its default if newer ones were set too, when torch refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return default
