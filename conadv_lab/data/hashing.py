"""Random numbers that are pure functions of (seed, name, epoch, image index).

Every batch, worker, rank and device gets the same bits: they come from an integer hash in wrapping 32-bit
arithmetic, not from a stateful generator.

>>> import torch
>>> keys = image_keys(0, "crop", torch.tensor([3, 3]), torch.tensor([7, 8]))
>>> keys
tensor([...], dtype=torch.int32)
>>> torch.equal(uniform(keys, 5)[1:], uniform(keys[1:], 5))
True
"""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor

from conadv_lab.mistakes import require


def image_keys(seed: int, name: str, epochs: Tensor, indices: Tensor) -> Tensor:
    """One key per image, for ``uniform``, ``signs`` and ``random_bytes``.

    Args:
        seed: the run's seed, any integer.
        name: what the numbers are for. Numbers under one name overlap; under different names they are independent.
        epochs: (B,) int64, the epoch of each image; a 0-d tensor applies to all.
        indices: (B,) int64, the images' indices in the data set, below 2³².

    Returns:
        (B,) int32. Within one (seed, name, epoch) no two images share a key.
    """
    digest = sha256(f"{seed}:{name}".encode()).digest()
    epoch_salt = int.from_bytes(digest[:4], "little", signed=True)
    index_salt = int.from_bytes(digest[4:8], "little", signed=True)
    of_epoch = _scramble_(epochs.to(torch.int32) ^ epoch_salt)
    of_index = _scramble_(indices.to(torch.int32) ^ index_salt)
    return _scramble_(of_index ^ of_epoch)


def uniform(keys: Tensor, count: int) -> Tensor:
    """``count`` numbers per image in [0, 1), multiples of 2⁻²⁴: (B,) int32 keys to (B, count) float32."""
    values = torch.empty(len(keys), count, dtype=torch.float32, device=keys.device)
    positions = _positions(keys, count)
    for rows in _blocks(values):
        words = _scramble_(keys[rows, None] ^ positions)
        torch.mul(words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF), 2.0**-24, out=values[rows])
    return values


def signs(keys: Tensor, count: int) -> Tensor:
    """``count`` fair signs per image, +1 or -1: (B,) int32 keys to (B, count) int8."""
    values = torch.empty(len(keys), count, dtype=torch.int8, device=keys.device)
    positions = _positions(keys, -(-count // 32))
    bit = torch.arange(32, dtype=torch.int32, device=keys.device)
    for rows in _blocks(values):
        words = _scramble_(keys[rows, None] ^ positions)
        bits = words.unsqueeze(-1).bitwise_right_shift(bit).bitwise_and_(1).flatten(1)
        values[rows] = bits[:, :count].mul_(2).sub_(1)
    return values


def random_bytes(keys: Tensor, count: int) -> Tensor:
    """``count`` random bytes per image: (B,) int32 keys to (B, count) uint8."""
    values = torch.empty(len(keys), count, dtype=torch.uint8, device=keys.device)
    positions = _positions(keys, -(-count // 4))
    for rows in _blocks(values):
        values[rows] = _scramble_(keys[rows, None] ^ positions).view(torch.uint8)[:, :count]
    return values


def _positions(keys: Tensor, count: int) -> Tensor:
    """Scrambled 0 … count-1, so that two images never share a run of words, as plain positions would allow."""
    require(keys.dtype == torch.int32, "the keys' dtype", str(keys.dtype), "int32, from image_keys")
    return _scramble_(torch.arange(count, dtype=torch.int32, device=keys.device))


def _blocks(values: Tensor) -> Iterator[slice]:
    """Blocks of rows small enough to stay in a core's cache throughout, or to bound memory on a GPU."""
    block = 1 << 26 if values.is_cuda else 1 << 16
    step = max(1, block // max(1, values.shape[1]))
    return (slice(start, start + step) for start in range(0, len(values), step))


def _scramble_(words: Tensor) -> Tensor:
    """lowbias32, a low-bias 32-bit finaliser (C. Wellons, public domain, 2018), in place on int32.

    Right shifts of int32 copy the sign bit, so each is masked to a logical shift; products wrap at 32 bits.
    """
    shifted = torch.empty_like(words)

    def fold(shift: int) -> Tensor:
        torch.bitwise_right_shift(words, shift, out=shifted)
        return words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))

    fold(16).mul_(0x7FEB352D)
    fold(15).mul_(0x846CA68B - (1 << 32))
    return fold(16)
