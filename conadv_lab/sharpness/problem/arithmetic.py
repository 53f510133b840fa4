"""float32 that is float32: a GPU multiplies convolutions with fewer digits of its own accord."""

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
    """Within it float32 products keep 24 bits, where TF32 keeps 11 and bfloat16 8; settings are put back.

    cuDNN convolves in TF32 by default, and ``torch.set_float32_matmul_precision`` allows it for the rest. A
    Hessian product would then be off by 1e-3 where bounds count float32's rounding of 1e-7.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_float32():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.set_float32_matmul_precision("highest")
    """
    places = GPU + CPU if _gpu_in_use() else CPU
    before = [place.fp32_precision for place in places]
    if all(precision in FULL for precision in before):  # as within another such block
        yield
        return
    convolutions = _unless_mixed(lambda: torch.backends.cudnn.allow_tf32, True)
    products = _unless_mixed(torch.get_float32_matmul_precision, "highest")
    try:
        # The older switches too, or whoever reads them meets an error about a mix of both.
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
    """What an older switch says; its default where newer ones were set beside it, which torch refuses to read."""
    try:
        return read()
    except RuntimeError:
        return default
