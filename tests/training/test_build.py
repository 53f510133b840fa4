"""From config to objects: lengths, learning rates, groups, calibration."""

import pytest
import torch

from conadv_lab.config import Config, resolved
from conadv_lab.recipes import digits
from conadv_lab.training.build import build


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(4_096, 28_151), (8_192, 14_075), (16_384, 7_038), (32_768, 3_519), (65_536, 1_759), (98_304, 1_173)],
)
def test_90_epochs_of_imagenet_have_the_known_number_of_steps(batch, steps):
    config = Config().replace(
        dataset="synthetic", synthetic_images=1_281_167, model="resnet20", global_batch=batch, epochs=90
    )
    assert build(resolved(config)).stream.steps == steps


def test_equal_cost_forms_take_half_the_images_a_step():
    equal = build(resolved(digits.vanilla().replace(method="recycled-equal", steps=10, warmup_steps=1)))
    plain = build(resolved(digits.vanilla().replace(steps=10)))
    assert plain.stream.first_place(10) == 2_560
    assert equal.stream.first_place(10) == 256 + 9 * 128
    by_epochs = build(resolved(digits.vanilla().replace(method="copy-equal", epochs=5)))
    assert by_epochs.stream.steps == round(5 * 898 / 128)


def test_the_learning_rate_is_scaled_once_and_recorded():
    config = resolved(Config().replace(base_lr=0.1, base_batch=128, global_batch=512, lr_rule="linear"))
    assert config.optimization.lr == pytest.approx(0.4)
    assert resolved(config).optimization.lr == pytest.approx(0.4)
    root = resolved(Config().replace(base_lr=0.1, base_batch=128, global_batch=512, lr_rule="sqrt"))
    assert root.optimization.lr == pytest.approx(0.2)
    own = resolved(Config().replace(lr=0.3, lr_rule="linear")).optimization
    assert (own.lr, own.lr_rule) == (0.3, "none")  # the rule did not make it


def test_weight_decay_spares_norms_and_biases():
    parts = build(resolved(digits.vanilla()))
    decayed, spared = parts.optimizer.param_groups
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = build(resolved(digits.vanilla())).model.state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    two = build(resolved(digits.conadv())).model.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    other = build(resolved(digits.vanilla().replace(seed=1))).model.state_dict()
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_calibration_covers_what_it_should_in_even_groups():
    parts = build(resolved(digits.vanilla()))
    sizes = [len(images) for images in parts.calibration()]
    assert sum(sizes) == 898
    assert max(sizes) - min(sizes) <= 1
    small = build(resolved(digits.vanilla().replace(bn_recalibrate=100)))
    assert [len(images) for images in small.calibration()] == [100]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "meta"}, "device is 'meta'; allowed: auto, cpu, cuda"),
        ({"steps": 2, "warmup_epochs": 2.0}, "warmup_epochs is 2, .* steps; allowed: at most the run's 2"),
        ({"steps": 2, "warmup_steps": 3}, "warmup_steps is 3, 3 steps; allowed: at most the run's 2"),
    ],
)
def test_a_device_or_a_warm_up_that_cannot_be_is_named_as_its_option(changes, message):
    with pytest.raises(ValueError, match=message):
        build(resolved(digits.vanilla().replace(**changes)))
