"""Synthetic sets: images of an index, of any size, without structure."""

import pytest
import torch

from conadv_lab.data.synthetic import Synthetic


def test_images_are_functions_of_the_index():
    data = Synthetic(size=10**9, shape=(3, 5, 7), classes=13)
    indices = torch.tensor([0, 999_999_999, 17, 17])
    images, labels = data.fetch(indices)
    assert (images.shape, images.dtype) == ((4, 3, 5, 7), torch.uint8)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)
    assert len(data) == 10**9
    assert torch.equal(images[2], images[3])
    assert not torch.equal(images[0], images[1])
    for place, index in enumerate(indices):
        image, label = data.fetch(index[None])
        assert torch.equal(image[0], images[place])
        assert label[0] == labels[place]


def test_pixels_and_labels_are_even():
    images, labels = Synthetic(size=5000, shape=(1, 8, 8), classes=7).fetch(torch.arange(5000))
    for values, kinds in ((images.flatten(), 256), (labels, 7)):
        counts = torch.bincount(values.long(), minlength=kinds).double()
        mean = values.numel() / kinds
        chi = ((counts - mean) ** 2 / mean).sum()
        assert len(counts) == kinds
        assert abs(chi - (kinds - 1)) < 4.5 * (2 * (kinds - 1)) ** 0.5


def test_seeds_differ():
    one, other = (Synthetic(size=10, seed=seed).fetch(torch.arange(10)) for seed in (0, 1))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_empty_request():
    images, labels = Synthetic(size=10).fetch(torch.arange(0))
    assert (images.shape, labels.shape) == ((0, 3, 32, 32), (0,))


@pytest.mark.parametrize("indices", [[-1, 0], [0, 10]])
def test_indices_outside_are_refused(indices):
    with pytest.raises(ValueError, match=r"indices range .*; allowed: 0 to 9"):
        Synthetic(size=10).fetch(torch.tensor(indices))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0; allowed: a whole number from 1"),
        ({"size": 2**31}, "size is 2147483648"),
        ({"shape": (3, 0, 8)}, r"shape is \(3, 0, 8\); allowed: \(channels"),
        ({"shape": (3, 8)}, r"shape is \(3, 8\)"),
        ({"classes": 0}, "classes is 0"),
    ],
)
def test_impossible_sets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(**{"size": 10, **settings})
