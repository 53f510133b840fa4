"""From config to objects: lengths, learning rates, groups, calibration."""

import pytest
import torch

from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import as_float
from conadv_lab.data.sets import TensorSet
from conadv_lab.recipes import digits
from conadv_lab.training.build import build, build_stream
from conadv_lab.training.distributed import ALONE, Ranks
from conadv_lab.training.evaluate import accuracy_and_loss, calibrated_copy, statistics_used


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


AUGMENTED = Config().replace(
    dataset="synthetic", synthetic_images=120, synthetic_pixels=8, model="resnet20", crop=2, crop_padding="reflect",
    flip=True, cutout=3, global_batch=40, epochs=4, bn_recalibrate=100, seed=7, threads=1,
)  # fmt: skip


@pytest.mark.parametrize("rule", ["random", "alternating"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_statistics_are_re_estimated_on_images_that_the_stream_itself_has(rule, precision):
    """Bit for bit an image of some epoch's steps; the images as they are would not be found there."""
    parts = build(resolved(AUGMENTED.replace(flip_rule=rule, precision=precision)))
    streamed = {}
    for number in range(parts.stream.steps):
        for batch in parts.stream.step(number).batches():
            for image, epoch, index in zip(batch.images, batch.epochs, batch.indices, strict=True):
                streamed[image.numpy().tobytes()] = int(epoch), int(index)
    found = [streamed[image.numpy().tobytes()] for images in parts.calibration() for image in images]
    assert len({index for _, index in found}) == len(found) == 100
    assert {epoch for epoch, _ in found} == {0, 1, 2, 3}
    plain = as_float(parts.train_set.fetch(torch.arange(120))[0]).to(next(parts.model.parameters()).dtype)
    assert sum(image.numpy().tobytes() in streamed for image in plain) < 30


def test_images_of_the_re_estimation_depend_on_the_seed_and_not_on_ranks_or_micro_batches():
    def images(ranks=ALONE, **changes):
        parts = build(resolved(AUGMENTED.replace(**changes)))
        parts.stream = build_stream(parts.config, parts.method, parts.train_set, ranks)
        return torch.cat(list(parts.calibration()))

    one = images()
    assert torch.equal(images(Ranks(number=1, count=2), micro_batch=10), one)
    assert torch.equal(images(method="conadv", global_batch=20), one)
    assert not torch.equal(images(seed=8), one)


def test_evaluation_uses_those_images():
    parts = build(resolved(AUGMENTED))
    norm = calibrated_copy(parts, parts.model).bn1.main
    with torch.no_grad():
        seen = [parts.model.conv1(parts.model.normalise(images)) for images in parts.calibration()]
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    kept = calibrated_copy(build(resolved(AUGMENTED.replace(bn_recalibrate=0))), parts.model).bn1.main
    assert torch.equal(kept.running_mean, parts.model.bn1.main.running_mean)


def test_results_say_which_statistics_they_are_judged_by():
    assert statistics_used(build(resolved(AUGMENTED))) == "re-estimated on 100 augmented training images"
    assert (
        statistics_used(build(resolved(AUGMENTED.replace(bn_recalibrate=0))))
        == "running averages of training"
    )
    parts = build(resolved(AUGMENTED))
    parts.model = torch.nn.Linear(2, 2)
    assert statistics_used(parts) == "no batch norm"


def test_mirrored_accuracy_is_that_of_averaged_logits():
    class LeftHalf(torch.nn.Module):
        """Class 1 by how bright the left half is, so each mirror image tells about the other half."""

        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            left = x[..., :4].mean((1, 2, 3)) * self.one
            return torch.stack([torch.full_like(left, 0.5), left], 1)

    images = torch.zeros(3, 3, 8, 8)
    images[0, ..., 4:], images[1, ..., :4], images[2] = 0.8, 1.0, 0.9
    shown = TensorSet(images, torch.tensor([0, 0, 1]), 2)  # averages of left and right: 0.4, 0.5, 0.9
    assert accuracy_and_loss(LeftHalf(), shown)[0] == pytest.approx(200 / 3)
    assert accuracy_and_loss(LeftHalf(), shown, mirror=True)[0] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_rule": "alternating"}, "flip_rule is 'alternating'; allowed without flip: 'random'"),
        ({"last_gamma": 1.0}, "last_gamma is 1; allowed for model digits-cnn: 0"),
        ({"last_gamma": 1.0, "model": "resnet_mine.py:net"}, "allowed for model resnet_mine.py:net: 0"),
        ({"last_gamma": -1.0}, "last_gamma is -1.0; allowed: at least 0"),
        ({"bias_lr_factor": -2.0}, "bias_lr_factor is -2.0; allowed: at least 0"),
        (
            {"dataset": "imagenet", "crop_padding": "reflect"},
            "crop_padding is 'reflect'; allowed with dataset imagenet",
        ),
        (
            {"crop": 8, "crop_padding": "reflect"},
            "crop is 8; allowed: 0 to 7 with reflection of images of side 8",
        ),
    ],
)
def test_settings_of_augmentation_and_networks_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(resolved(digits.vanilla().replace(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "meta"}, "device is 'meta'; allowed: auto, cpu, cuda"),
        (
            {"steps": 2, "warmup_epochs": 2.0},
            "warmup_epochs is 2, .* steps; allowed: at most the run's 2; --warmup-epochs 0 trains",
        ),
        ({"steps": 2, "warmup_steps": 3}, "warmup_steps is 3, 3 steps; allowed: at most the run's 2"),
    ],
)
def test_a_device_or_a_warm_up_that_cannot_be_is_named_as_its_option(changes, message):
    with pytest.raises(ValueError, match=message):
        build(resolved(digits.vanilla().replace(**changes)))
