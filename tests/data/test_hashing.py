"""The integer hash: known values, the same bits however it is drawn, and no visible structure."""

import pytest
import torch

from conadv_lab.data.hashing import image_keys, random_bytes, signs, uniform


def keys(count: int, seed: int = 0, name: str = "test", epoch: int = 0) -> torch.Tensor:
    return image_keys(seed, name, torch.tensor(epoch), torch.arange(count))


def scramble(word: int) -> int:
    """lowbias32 in Python's unbounded integers."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def test_equals_unbounded_integer_arithmetic():
    some = keys(70)
    expected = [[(scramble(k % 2**32 ^ scramble(j)) >> 8) / 2**24 for j in range(9)] for k in some.tolist()]
    assert uniform(some, 9).tolist() == expected
    bits = [[scramble(k % 2**32 ^ scramble(j // 32)) >> j % 32 & 1 for j in range(40)] for k in some.tolist()]
    assert signs(some, 40).tolist() == [[2 * b - 1 for b in row] for row in bits]
    words = [
        b"".join(scramble(k % 2**32 ^ scramble(j)).to_bytes(4, "little") for j in range(3))
        for k in some.tolist()
    ]
    assert random_bytes(some, 10).tolist() == [list(row[:10]) for row in words]


def test_known_values_never_change():
    assert keys(3, seed=7, name="start", epoch=5).tolist() == [-176090943, 154471932, -1760007163]
    assert uniform(torch.tensor([1], dtype=torch.int32), 2).tolist() == [
        [0.40834903717041016, 0.8217079043388367]
    ]


def test_independent_of_the_batch_and_of_the_blocks():
    whole = keys(300)
    values, flips = uniform(whole, 1000), signs(whole, 1000)
    for start, end in ((0, 1), (17, 203), (299, 300)):
        assert torch.equal(uniform(whole[start:end], 1000), values[start:end])
        assert torch.equal(signs(whole[start:end], 1000), flips[start:end])
    assert torch.equal(uniform(whole, 3), values[:, :3])
    assert uniform(whole[:0], 5).shape == (0, 5)
    assert signs(whole, 0).shape == (300, 0)


def test_epochs_may_differ_within_a_batch():
    mixed = image_keys(0, "test", torch.tensor([0, 4]), torch.tensor([5, 5]))
    assert mixed.tolist() == [keys(6)[5].item(), keys(6, epoch=4)[5].item()]


def test_no_two_images_of_an_epoch_share_a_key():
    assert keys(200_000).unique().numel() == 200_000


def test_seed_name_and_epoch_each_change_every_stream():
    n = 10_000
    base = uniform(keys(n), 1).flatten()
    for other in (keys(n, seed=1), keys(n, name="tesu"), keys(n, epoch=1)):
        correlation = torch.corrcoef(torch.stack([base, uniform(other, 1).flatten()]))[0, 1]
        assert abs(correlation) < 4.5 / n**0.5


def test_moments_and_histogram():
    n = 1000 * 1000
    values = uniform(keys(1000), 1000).double().flatten()
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 1 / 2) < 4.5 * (1 / 12 / n) ** 0.5
    assert abs(values.var() - 1 / 12) < 4.5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(values.float(), bins=256, min=0, max=1).double()
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 4.5 * (2 * 255) ** 0.5
    flips = signs(keys(1000), 1000).double()
    assert set(flips.unique().tolist()) == {-1.0, 1.0}
    assert abs(flips.mean()) < 4.5 / n**0.5
    # per image and per pixel too: the largest of 1000 means of 1000 signs
    for means in (flips.mean(0), flips.mean(1)):
        assert means.abs().max() < 5.5 / 1000**0.5
        assert means.abs().max() > 1 / 1000**0.5


@pytest.mark.parametrize("draw", [uniform, signs])
@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, 1), (1, 1), (2, 0), (0, 32), (64, 0)])
def test_neighbouring_images_and_pixels_are_uncorrelated(draw, rows, columns):
    values = draw(keys(1024), 1024).double()
    values = (values - values.mean()) / values.std()
    products = values[rows:, columns:] * values[: 1024 - rows, : 1024 - columns]
    assert abs(products.mean()) < 4.5 / products.numel() ** 0.5


def test_keys_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"int64.*image_keys"):
        uniform(torch.arange(3), 2)


@pytest.mark.gpu
def test_same_bits_on_cuda():
    epochs, indices = torch.arange(500) % 3, torch.arange(500)
    here = image_keys(3, "test", epochs, indices)
    there = image_keys(3, "test", epochs.cuda(), indices.cuda())
    assert torch.equal(there.cpu(), here)
    assert torch.equal(uniform(there, 1000).cpu(), uniform(here, 1000))
    assert torch.equal(signs(there, 1000).cpu(), signs(here, 1000))
    assert torch.equal(random_bytes(there, 1001).cpu(), random_bytes(here, 1001))
