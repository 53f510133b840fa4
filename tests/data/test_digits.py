"""The digits and their fixed split."""

import hashlib

import torch
from sklearn import datasets

from conadv_lab.data.digits import load_digits


def test_shapes_and_scale():
    images, labels, test_images, test_labels = load_digits()
    assert (images.shape, test_images.shape) == ((898, 1, 8, 8), (899, 1, 8, 8))
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    levels = torch.cat([images, test_images]).unique().tolist()
    assert levels == [round(value * 255 / 16) for value in range(17)]


def test_the_halves_are_the_whole_and_share_nothing():
    images, labels, test_images, test_labels = load_digits()
    bundle = datasets.load_digits()
    original = sorted(
        (label, (image * 255 / 16).round().astype("uint8").tobytes())
        for image, label in zip(bundle.images, bundle.target.tolist(), strict=True)
    )
    pairs = zip(torch.cat([images, test_images]), torch.cat([labels, test_labels]).tolist(), strict=True)
    assert sorted((label, image.numpy().tobytes()) for image, label in pairs) == original


def test_each_class_is_halved():
    _, labels, _, test_labels = load_digits()
    difference = torch.bincount(labels) - torch.bincount(test_labels)
    assert difference.abs().max() <= 1
    assert len(difference) == 10


def test_the_split_never_changes():
    images, labels, _, _ = load_digits()
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest[:16] == "19519e55f979bf27"
    assert not torch.equal(labels, labels.sort().values)
