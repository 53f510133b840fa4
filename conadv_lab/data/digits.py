"""scikit-learn's handwritten digits (Alpaydin, Kaynak 1998): 1797 real images, no download needed."""

import numpy as np
import torch
from torch import Tensor

from conadv_lab.data.hashing import image_keys
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.sets import TensorSet


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits, split into two fixed halves with every class divided evenly.

    The values 0 … 16 become round(value · 255 / 16), so that images are uint8 as in other sets.

    Returns:
        train images (898, 1, 8, 8) uint8, train labels (898,) int64, test images (899, 1, 8, 8) uint8, test
        labels (899,) int64.

    >>> train_images, train_labels, test_images, test_labels = load_digits()
    >>> train_images.shape, test_images.shape
    (torch.Size([898, 1, 8, 8]), torch.Size([899, 1, 8, 8]))
    """
    from sklearn import datasets  # takes a second to import, which other data sets need not pay

    bundle = datasets.load_digits()
    images = torch.from_numpy(np.rint(bundle.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    # Take every other image after sorting by class, then by hash: this halves each class to within one image.
    places = torch.arange(len(labels), device="cpu")
    order = image_keys(0, "digits split", torch.zeros((), dtype=torch.int64, device="cpu"), places).argsort()
    order = order[labels[order].argsort(stable=True)]
    train, test = order[1::2].sort().values, order[0::2].sort().values
    return images[train], labels[train], images[test], labels[test]


def digits_sets(section: Data, demand: Demand, device: torch.device) -> tuple[TensorSet, TensorSet]:
    images, labels, test_images, test_labels = load_digits()
    return TensorSet(images, labels, 10), TensorSet(test_images, test_labels, 10)
