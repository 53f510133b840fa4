"""NoFrost's recipe: its published settings, and two steps on photographs made for the test."""

import pytest

from conadv_lab.config import resolved
from conadv_lab.recipes.nofrost import nofrost
from conadv_lab.training.loop import train
from tests.data.trees import write_tree


def test_settings_are_the_published_ones():
    config = resolved(nofrost())
    method, section = config.method, config.optimization
    assert (method.epsilon, method.attack_step, method.attack_steps) == pytest.approx((8 / 255, 1 / 255, 10))
    assert (method.weights, method.staleness) == ((0.5, 0.5), 0)
    assert (section.lr, section.momentum, section.nesterov, section.weight_decay) == (0.1, 0.9, True, 5e-5)
    assert (section.schedule, section.warmup_epochs, section.label_smoothing) == ("cosine", 0.0, 0.1)
    assert (section.adaptive_clipping, config.training.epochs) == (0.0, 90)
    assert resolved(nofrost().replace(global_batch=1024)).optimization.lr == pytest.approx(0.4)


def test_two_steps_train_and_tell_robust_accuracy(tmp_path):
    """A smaller network of the same kind, under two attack steps."""
    config = nofrost().replace(
        data_dir=str(write_tree(tmp_path / "tree", train=4, val=1)), pixels=32, eval_pixels=32, workers=0,
        model="nf-resnet20", precision="float32", attack_steps=2, global_batch=4, steps=2, threads=1,
        bn_recalibrate=4, pgd_images=2, pgd_steps=1,
    )  # fmt: skip
    result = train(config, tmp_path / "run", progress="none").result()
    assert result["steps"] == 2
    assert 0 <= result["pgd_accuracy"] <= 100
