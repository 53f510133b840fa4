"""Crops, policies, erasing and mixup beside what torchvision answered for the same parameters.

The answers are recorded by tests/data/record_torchvision.py on a machine that has torchvision.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conadv_lab.data import policies
from conadv_lab.data.crops import centre_crop, crop_box, erased_box, resized_crop
from conadv_lab.data.hashing import image_keys, uniform
from conadv_lab.data.mixup import mixed, mixup_weights
from conadv_lab.models.resnet import resnet50
from tests.models.filled import fill

with np.load(Path(__file__).parent / "torchvision_answers.npz", allow_pickle=False) as file:
    ANSWERS = {name: file[name] for name in file.files}
IMAGE = ANSWERS["image"]
STEP = 1 / 255 + 1e-6


def difference(ours, theirs) -> float:
    """Largest difference of two uint8 images, the first (H, W, 3), the second too or (3, H, W)."""
    theirs = theirs if theirs.shape[-1] == 3 else theirs.transpose(1, 2, 0)
    assert np.asarray(ours).shape == theirs.shape
    return np.abs(np.asarray(ours).astype(int) - theirs.astype(int)).max()


@pytest.mark.parametrize("kind", ["crop_boxes", "erased_boxes"])
def test_boxes_are_torchvisions(kind):
    """180 images of six shapes, some so long that no crop fits."""
    for size, draws, expected in zip(ANSWERS["box_sizes"], ANSWERS["box_draws"], ANSWERS[kind], strict=True):
        height, width = map(int, size)
        if kind == "crop_boxes":
            assert crop_box(height, width, draws.tolist()) == tuple(expected)
        else:
            # torchvision answers the whole image where no attempt fits, and erases nothing then
            whole = tuple(expected) == (0, 0, height, width)
            assert erased_box(height, width, [0.0, *draws.tolist()], 0.5) == (
                None if whole else tuple(expected)
            )


def test_nothing_is_erased_as_often_as_asked():
    draws = uniform(image_keys(0, "erase", torch.tensor(0), torch.arange(4000)), 41).tolist()
    share = np.mean([erased_box(224, 224, row, 0.25) is not None for row in draws])
    assert share == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("number", range(4))
def test_resized_crops_are_torchvisions(number):
    box = tuple(int(value) for value in ANSWERS["crops"][number])
    ours = resized_crop(IMAGE, box, 24)
    assert difference(ours, ANSWERS[f"crop_{number}_tensor"]) <= 1
    assert difference(ours, ANSWERS[f"crop_{number}_pillow"]) <= 2  # 8-bit rounding in another order
    assert difference(resized_crop(IMAGE, box, 24, mirrored=True).numpy()[:, ::-1], ours.numpy()) == 0


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize(("resize", "side"), [(32, 28), (27, 24), (50, 44)])
def test_centre_crops_are_torchvisions(shape, resize, side):
    pixels = IMAGE if shape == "wide" else np.ascontiguousarray(IMAGE.transpose(1, 0, 2))
    ours = centre_crop(pixels, resize, side).numpy()
    assert difference(ours, ANSWERS[f"centre_{shape}_{resize}_{side}"]) <= 1


@pytest.mark.parametrize("case", [str(case) for case in ANSWERS["magnitudes"]])
def test_operations_are_torchvisions(case):
    name, number, amount = case.split()
    ours = policies.OPERATIONS[name](Image.fromarray(IMAGE), float(amount))
    theirs = ANSWERS[f"op_{name}_{number}"]
    assert difference(ours, theirs) <= 1
    assert difference(IMAGE, theirs) > 1, "the operation did nothing, so this test could not fail"


@pytest.mark.parametrize("name", ["identity", "autocontrast", "equalize", "invert"])
def test_operations_without_a_magnitude_are_torchvisions(name):
    assert difference(policies.OPERATIONS[name](Image.fromarray(IMAGE), 0.0), ANSWERS[f"op_{name}_0"]) <= 1


def test_the_policy_and_the_levels_are_torchvisions():
    names = list(policies.OPERATIONS)
    table = [[[names.index(name), p, level] for name, p, level in pair] for pair in policies.AUTOAUGMENT]
    np.testing.assert_array_equal(np.array(table), ANSWERS["autoaugment"])
    assert list(policies.RANDAUGMENT) == ANSWERS["randaugment"].tolist()
    assert sorted(policies.SIGNED) == sorted(ANSWERS["signed"].tolist())
    for which, bins in (("auto", 10), ("rand", 31)):
        for name in names:
            levels = ANSWERS.get(f"levels_{which}_{name}")
            if levels is not None and name not in ("identity", "autocontrast", "equalize", "invert"):
                ours = [policies.magnitude(name, level, bins, 40, 32) for level in range(bins)]
                np.testing.assert_allclose(ours, levels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", range(25))
def test_autoaugment_is_torchvisions(number):
    draws = ANSWERS["policy_draws"][number].tolist()
    draws[0] = (number + 0.5) / 25
    ours = policies.autoaugment(Image.fromarray(IMAGE), draws)
    assert difference(ours, ANSWERS[f"autoaugment_{number}"]) <= 1


@pytest.mark.parametrize("number", range(12))
def test_randaugment_is_torchvisions(number):
    ours = policies.randaugment(Image.fromarray(IMAGE), ANSWERS["policy_draws"][number].tolist())
    assert difference(ours, ANSWERS[f"randaugment_{number}"]) <= 1


def test_mixup_is_torchvisions_with_each_image_after_the_one_before():
    images = torch.from_numpy(ANSWERS["mix_images"]).float() / 255
    labels = torch.tensor([0, 3, 3, 1])
    around = [torch.cat([x[-1:], x]) for x in (images, labels)]  # torchvision mixes the first with the last
    ours, targets = mixed(*around, torch.full((4,), 0.3), classes=5)
    np.testing.assert_allclose(ours, ANSWERS["mixed"], atol=1e-6)
    np.testing.assert_allclose(targets, ANSWERS["mixed_labels"], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_weights_have_betas_moments(alpha):
    keys = image_keys(0, "mixup", torch.tensor(3), torch.arange(20_000))
    weights = mixup_weights(keys, alpha)
    assert weights.mean() == pytest.approx(0.5, abs=0.01)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    assert torch.equal(mixup_weights(keys[7:9], alpha), weights[7:9])


def test_resnet50_gives_torchvisions_logits():
    """Weights that both sides can make; one state dict in both on the spot is checked when recording."""
    model = resnet50().eval()
    fill(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255)
    np.testing.assert_allclose(logits, ANSWERS["logits"], atol=1e-5)
    assert np.abs(ANSWERS["logits"]).max() > 1
