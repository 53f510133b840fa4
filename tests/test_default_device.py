"""Training on a device that is not the default one: every method, optimiser, data set and network of the package."""

import os
import subprocess
import sys

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from conadv_lab.config import Config
from conadv_lab.data import order
from conadv_lab.data.lookahead import lookahead
from conadv_lab.data.options import DATASETS
from conadv_lab.data.policies import _evenly
from conadv_lab.footprint import memory_bytes
from conadv_lab.methods import METHODS
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.models.options import MODELS
from conadv_lab.optim.options import OPTIMIZERS
from conadv_lab.training.build import build
from conadv_lab.training.evaluate import fixed_images
from conadv_lab.training.loop import train
from conadv_lab.training.restore import restore
from tests.data.test_cifar import IMAGES, small, write_folder  # noqa: F401 - a fixture
from tests.data.trees import write_tree
from tests.elsewhere import elsewhere

SMALL = {
    "steps": 3, "global_batch": 12, "micro_batch": 4, "device": "cpu", "threads": 1, "bn_recalibrate": 60,
    "train_images": 60, "pgd_images": 20, "checkpoint_every": 2, "synthetic_images": 60, "synthetic_pixels": 8,
    "seed": 20_261_126,  # of no other test: orders are cached
}  # fmt: skip


def trained(folder, **changes) -> dict[str, torch.Tensor]:
    """The weights of a short run that is then read again, as from the command line but for the default device."""
    order._permutation.cache_clear()
    config = Config().replace(**{**SMALL, **changes})
    with elsewhere():
        run = train(config, folder, progress="none")
        parts, model = restore(run.path)
        fixed_images(parts.train_set, 2)
    assert {p.device.type for p in model.state_dict().values()} == {"cpu"}
    return model.state_dict()


IMPORTS = """
import importlib, pkgutil
import conadv_lab
from tests.elsewhere import elsewhere
with elsewhere():
    for module in pkgutil.walk_packages(conadv_lab.__path__, "conadv_lab."):
        if not module.name.endswith(("__main__", "imagenet_dali")):
            importlib.import_module(module.name)
"""


@pytest.mark.parametrize("method", METHODS)
def test_methods(method, tmp_path):
    weights = trained(tmp_path / "elsewhere", method=method)
    train(Config().replace(**SMALL, method=method), tmp_path / "here", progress="none")
    expected = restore(tmp_path / "here")[1].state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer, tmp_path):
    trained(tmp_path / "run", optimizer=optimizer, lr=0.01)


MORE = {
    "averaged weights": {"ema": 0.5},
    "float64": {"precision": "float64", "crop": 1, "flip": True, "cutout": 2},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "pgd": {"attack_steps": 2, "attack_step": 0.01},
    "l2": {"attack_steps": 2, "norm": "l2", "epsilon": 1.0, "attack_step": 0.5},
    "probes": {"probe_every": 1, "staleness": 2, "evaluate_every": 2},
    "LARS A": {"optimizer": "lars", "lars_variant": "A"},
    "LARS C": {"optimizer": "lars", "lars_variant": "C"},
}


@pytest.mark.parametrize("name", MORE)
def test_options(name, tmp_path):
    trained(tmp_path / "run", **MORE[name])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dataset", DATASETS)
def test_data_sets(dataset, tmp_path):
    changes = {"crop": 1, "flip": True, "cutout": 2}
    if dataset.startswith("cifar"):
        write_folder(tmp_path, dataset, 0)
        changes |= {"data_dir": str(tmp_path), "train_images": IMAGES, "model": "resnet20"}
    if dataset == "synthetic":
        changes |= {"train_images": None, "model": "resnet20"}
    if DATASETS[dataset].photographs:
        _evenly.cache_clear()
        write_tree(tmp_path)
        changes = {
            "data_dir": str(tmp_path), "train_images": 20, "model": "resnet20", "pixels": 32, "eval_pixels": 32,
            "policy": "autoaugment", "mixup": 0.2, "erasing": 0.9, "flip": True,
        }  # fmt: skip
    trained(tmp_path / "run", dataset=dataset, pgd_images=0, **changes)


@pytest.mark.parametrize("model", MODELS)
def test_networks(model):
    """Built, tried on two images, and counted in bytes, where the package's own network is on the host."""
    config = Config().replace(
        **{**SMALL, "model": model, "dataset": "digits" if model == "digits-cnn" else "synthetic"}
        | {"train_images": None, "synthetic_pixels": 32, "lr": 0.1, "weights": (0.5, 0.5)}
    )
    with elsewhere():
        parts = build(config)
        if model == "digits-cnn":
            memory_bytes(config, 12, 6)
    assert {p.device.type for p in parts.model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("attack", [SignAttack(0.1), PGDAttack(0.1)], ids=["sign", "pgd"])
def test_room_for_perturbations_that_other_ranks_send(attack):
    with elsewhere():
        assert attack.space((2, 1, 4, 4), torch.float32).device.type == "cpu"


def test_a_loader_of_ones_own():
    images, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    with elsewhere():
        steps = list(lookahead([(images, labels)], steps=3, ahead=1))
        assert [len(list(step.batches())) for step in steps] == [1, 1, 1]


def test_imports():
    """In a process of its own, as a module is imported once: what is made then stays."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_what_is_made_without_a_device_is_found():
    """The watch itself: torch's own average counts its updates wherever the default device is."""
    with pytest.raises(AssertionError, match=r"torch\.tensor was not told on which device"), elsewhere():
        AveragedModel(torch.nn.Linear(1, 1, device="cpu"))
