"""ImageNet's recipes on photographs made for the test: they run, resume bitwise, and say what they say."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conadv_lab import train as train_command
from conadv_lab.config import Config, resolved
from conadv_lab.methods import method_of
from conadv_lab.plan import times
from conadv_lab.recipes.imagenet import RECIPES
from conadv_lab.training import loop
from conadv_lab.training.loop import train
from tests.data.trees import write_tree

AUGMENTED = {"policy": "autoaugment", "mixup": 0.2, "erasing": 0.25}
VARIANTS = {
    "imagenet-resnet50-4k": {"method": "vanilla", "policy": "randaugment"},
    "imagenet-resnet50-8k": {"method": "disadv"},
    "imagenet-resnet50-16k": {"method": "recycled", **AUGMENTED},
    "imagenet-resnet50-32k": {"method": "recycled-equal"},
    "imagenet-resnet50-64k": {"method": "copy-equal", "policy": "autoaugment"},
    "imagenet-resnet50-96k": {"method": "conadv", **AUGMENTED},
    "imagenet-advprop": {},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), train=4, val=1)


def small(name: str, root: Path, pixels: int, **changes) -> Config:
    """The recipe cut down to two steps of four images."""
    return RECIPES[name]().replace(**{
        "data_dir": str(root), "pixels": pixels, "eval_pixels": pixels, "global_batch": 4, "micro_batch": 2,
        "steps": 2, "warmup_steps": 1, "threads": 1, "workers": 0, "bn_recalibrate": 4, "log_every": 1,
        "checkpoint_every": 1, **changes,
    })  # fmt: skip


class Killed(BaseException):
    """Stands for a kill."""


def digests(config: Config, tmp_path: Path, monkeypatch) -> list[str]:
    """The final weights of a run that is killed after its first step and resumed, and of one that is not."""
    original = loop.Run.train_step

    def until(run):
        if run.step == 1:
            raise Killed
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", until)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", progress="none")
    folders = [
        train(config, tmp_path / "killed", resume=True, progress="none"),
        train(config, tmp_path / "whole", progress="none"),
    ]
    return [folder.result()["parameters_sha256"] for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_two_steps_and_resumes_bitwise(name, tree, tmp_path, monkeypatch):
    workers = 1 if name.endswith("96k") else 0
    resumed, whole = digests(small(name, tree, 64, workers=workers, **VARIANTS[name]), tmp_path, monkeypatch)
    assert resumed == whole


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pixels", [64, 224])
def test_real_photographs(name, pixels, tmp_path, monkeypatch):
    """One photograph a class and no validation set: the same photographs serve."""
    photos = os.environ.get("CONADV_PHOTOS")
    if not photos:
        pytest.skip("CONADV_PHOTOS names no folder that holds train/<class>/<photograph>")
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(Path(photos) / "train", target_is_directory=True)
    config = small(name, tmp_path / "data", pixels, **VARIANTS[name])
    config = replace(config, training=replace(config.training, bn_recalibrate=8))
    resumed, whole = digests(config, tmp_path, monkeypatch)
    assert resumed == whole


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_says_what_the_plan_predicts(name):
    (command,) = re.findall(r"conadv_lab\.train (.+)", RECIPES[name].__doc__)
    config = resolved(train_command.parse(command.replace("DIR", "data").split())[0])
    minutes = [times(config, method_of(config), devices)["minutes"] for devices in (8, 64, 256)]
    assert " / ".join(f"{one:.1f}" for one in minutes) + " minutes" in RECIPES[name].__doc__
    assert len(re.findall("not yet measured", RECIPES[name].__doc__)) == 2


def test_settings_are_the_published_ones():
    """facts of the NUS recipe: lr 4 √(B/512); warm-up in epochs up to 32K."""
    large = {name: recipe for name, recipe in RECIPES.items() if name.startswith("imagenet-resnet50-")}
    rows = [
        (r.optimization.lr, r.optimization.warmup_epochs) for r in (resolved(f()) for f in large.values())
    ]
    expected = [(11.31, 1.25), (16, 2.5), (22.63, 5), (32, 14), (45.25, 25), (55.43, 30)]
    for found, wanted in zip(rows, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for recipe in large.values():
        section = recipe().optimization
        assert (section.lars_variant, section.weight_decay, section.momentum) == ("C", 1e-4, 0.9)


def test_a_timm_model_without_timm_names_the_extra(tree, tmp_path):
    try:
        import timm
    except ImportError:
        timm = None
    if timm is not None:
        pytest.skip("timm is installed")
    config = small("imagenet-resnet50-4k", tree, 64, model="timm:efficientnet_b0")
    with pytest.raises(ValueError, match=r"needs timm, .*conadv-lab\[vision\]"):
        train(config, tmp_path / "run", progress="none")
    assert not (tmp_path / "run").exists()


def test_timm_models_keep_their_activations_and_train():
    pytest.importorskip("timm", reason="timm is not installed (extra vision)")
    import timm
    import torch

    from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
    from conadv_lab.models.timm_models import timm_model

    torch.manual_seed(0)
    model = timm_model("efficientnet_b0", 7)
    plain = timm.create_model("efficientnet_b0", num_classes=7)
    plain.load_state_dict(
        dict(zip(plain.state_dict(), model.network.state_dict().values(), strict=True)), strict=True
    )
    images = torch.rand(2, 3, 64, 64)
    model = mixture_batch_norm(model).eval()
    torch.testing.assert_close(model(images), plain.eval()(model.normalise(images)))
    with one_update(model.train()), branch_of(model, "adversarial"):
        model(images).sum().backward()
    with pytest.raises(ValueError, match=r"unknown timm model 'efficientnet_b00'.*Did you mean"):
        timm_model("efficientnet_b00", 7)
