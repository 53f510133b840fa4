"""The first images of CIFAR-10, for small runs: ``--dataset benchmarks/truncated_cifar.py:sets``."""

from conadv_lab.config import Config
from conadv_lab.data.cifar import load_cifar
from conadv_lab.data.sets import TensorSet

TRAIN, TEST = 256, 100


def sets(config: Config) -> tuple[TensorSet, TensorSet]:
    """Training and test set from the config's ``data_dir``."""
    images, labels, test_images, test_labels = load_cifar(config.data.data_dir)
    # Copy, as a slice would keep all 60,000 images alive.
    train = TensorSet(images[:TRAIN].clone(), labels[:TRAIN].clone(), 10)
    return train, TensorSet(test_images[:TEST].clone(), test_labels[:TEST].clone(), 10)
