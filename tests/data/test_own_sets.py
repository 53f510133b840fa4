"""A data set of a user's own is whatever the protocol says: tensors, a class, or a folder of photographs."""

import pytest

from conadv_lab.config import Config
from conadv_lab.training.loop import train
from tests.data.trees import write_tree

OWN = """
import torch
from conadv_lab.config import demand_of
from conadv_lab.data.imagenet import load_photographs
from conadv_lab.data.synthetic import Synthetic

class Stripes:
    classes = 3

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def fetch(self, indices):
        images, labels = Synthetic(self.count, (1, 8, 8)).fetch(indices)
        return images, labels % 3

class Told(Stripes):
    def fingerprint(self):
        return "stripes"

class Broken(Stripes):
    def fetch(self, indices):
        images, labels = super().fetch(indices)
        return images, labels + 3

def stripes(config):
    return Stripes(60), Stripes(20)

def told(config):
    return Told(60), Told(20)

def broken(config):
    return Broken(60), Broken(20)

def photographs(config):
    return load_photographs(config.data, demand_of(config), "cpu")

def numbers(config):
    return [1, 2], [3]
"""
SMALL = {"steps": 2, "global_batch": 8, "threads": 1, "bn_recalibrate": 8, "device": "cpu"}


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own_sets.py"
    file.write_text(OWN)
    return file


def test_any_image_set_is_trained_on(own, tmp_path):
    run = train(Config().replace(dataset=f"{own}:stripes", **SMALL), tmp_path / "run", progress="none")
    assert run.manifest()["data"] == "60 images"
    part = Config().replace(dataset=f"{own}:told", train_images=40, **SMALL)
    assert train(part, tmp_path / "part", progress="none").manifest()["data"] == "40 of stripes"


def test_its_images_are_looked_at(own, tmp_path):
    with pytest.raises(ValueError, match=r"labels range from . to 5; allowed: 0 to 2"):
        train(Config().replace(dataset=f"{own}:broken", **SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match="returned list, list; allowed: two ImageSets, train and test"):
        train(Config().replace(dataset=f"{own}:numbers", **SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match=r"mixup is 0.2; allowed with dataset .*: 0.0"):
        train(Config().replace(dataset=f"{own}:stripes", mixup=0.2, **SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match="train_images is 61; allowed: 1 to 60"):
        train(Config().replace(dataset=f"{own}:stripes", train_images=61, **SMALL), tmp_path / "run")


def test_photographs_need_not_be_called_imagenet(own, tmp_path):
    """Under all three names the same run, augmented as photographs are."""
    write_tree(tmp_path / "tree")
    photographs = {"data_dir": str(tmp_path / "tree"), "pixels": 32, "eval_pixels": 32, "model": "resnet20",
                   "policy": "randaugment", "mixup": 0.2, "flip": True}  # fmt: skip
    results = []
    for number, name in enumerate(["imagenet", "photographs", f"{own}:photographs"]):
        config = Config().replace(dataset=name, **photographs, **SMALL)
        results.append(train(config, tmp_path / f"run{number}", progress="none").result())
    assert len({result["parameters_sha256"] for result in results}) == 1
    config = Config().replace(dataset=f"{own}:photographs", crop=4, **photographs, **SMALL)
    with pytest.raises(ValueError, match=r"crop is 4; allowed with dataset .*: 0"):
        train(config, tmp_path / "other")
