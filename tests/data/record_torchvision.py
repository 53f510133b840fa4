"""Records what torchvision answers, for tests on machines that cannot have it beside this project's torch.

    python -m tests.data.record_torchvision      # torchvision 0.29, any torch that it likes; writes the .npz

Only conadv_lab's ResNet is imported of this project, to compare logits from one state dict on the spot.
"""

from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from torchvision.transforms import (
    AutoAugment,
    InterpolationMode,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    v2,
)
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from conadv_lab.models.resnet import resnet50
from tests.data.photos import photo
from tests.models.filled import fill

OUT = Path(__file__).parent / "torchvision_answers.npz"
NAMES = {
    "identity": "Identity", "shear-x": "ShearX", "shear-y": "ShearY", "translate-x": "TranslateX",
    "translate-y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip
MAGNITUDES = {
    "shear-x": (0.3, -0.1), "shear-y": (0.17, -0.3), "translate-x": (9.7, -4.2), "translate-y": (3.9, -11.0),
    "rotate": (30.0, -6.6), "brightness": (0.9, -0.9), "color": (0.5, -0.8), "contrast": (0.7, -0.3),
    "sharpness": (0.9, -0.6), "posterize": (4, 6), "solarize": (141.67, 28.3),
}  # fmt: skip
CROPS = [(0, 0, 32, 40), (3, 5, 20, 27), (10, 20, 7, 6), (0, 1, 31, 38)]


class Draws:
    """Stands in torch's generator's place: attempt by attempt the four numbers that a test will use."""

    def __init__(self, table):
        self.table, self.uniforms, self.integers = table, count(), count()

    def uniform(self, tensor, low, high):
        number = next(self.uniforms)
        self.attempt = number // 2
        return tensor.fill_(low + (high - low) * self.table[self.attempt, number % 2].item())

    def randint(self, low, high=None, size=None, **_):
        place = 2 + next(self.integers) % 2
        return torch.tensor([low + int(self.table[self.attempt, place] * (high - low))])

    @contextmanager
    def patched(self):
        uniform = self.uniform
        in_place = patch.object(torch.Tensor, "uniform_", lambda tensor, a, b: uniform(tensor, a, b))
        with patch.object(torch, "randint", self.randint), in_place:
            yield


def drawn(function, table):
    with Draws(table.reshape(-1, 4)).patched():
        return [int(value) for value in function()[:4]]


def boxes(answers: dict) -> None:
    draw = np.random.default_rng(0)
    sizes = [(375, 500), (500, 333), (60, 400), (400, 50), (224, 224), (33, 1000)]
    tables = draw.random((len(sizes) * 30, 40)).astype(np.float32)
    answers["box_sizes"] = np.repeat(sizes, 30, axis=0)
    answers["box_draws"] = tables
    answers["crop_boxes"] = np.array([
        drawn(lambda h=h, w=w: RandomResizedCrop.get_params(torch.empty(3, h, w), (0.08, 1), (3 / 4, 4 / 3)), table)
        for (h, w), table in zip(answers["box_sizes"], tables, strict=True)
    ])  # fmt: skip
    answers["erased_boxes"] = np.array([
        drawn(lambda h=h, w=w: RandomErasing.get_params(torch.empty(3, h, w), (0.02, 0.33), (0.3, 3.3), [0.0]), table)
        for (h, w), table in zip(answers["box_sizes"], tables, strict=True)
    ])  # fmt: skip


def geometry(image, answers: dict) -> None:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for i, (top, left, height, width) in enumerate(CROPS):
        options = {"size": [24, 24], "interpolation": InterpolationMode.BILINEAR, "antialias": True}
        answers[f"crop_{i}_tensor"] = F.resized_crop(tensor, top, left, height, width, **options).numpy()
        answers[f"crop_{i}_pillow"] = np.asarray(F.resized_crop(image, top, left, height, width, **options))
    for resize, side in ((32, 28), (27, 24), (50, 44)):
        for name, turned in (("wide", tensor), ("tall", tensor.transpose(1, 2).contiguous())):
            resized = F.resize(turned, resize, InterpolationMode.BILINEAR, antialias=True)
            answers[f"centre_{name}_{resize}_{side}"] = F.center_crop(resized, [side, side]).numpy()
    mean, std = (
        torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1),
        torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1),
    )
    erased = F.erase((tensor / 255 - mean) / std, 4, 7, 12, 20, torch.zeros(1))
    answers["erased"] = (erased * std + mean).numpy()


def policies(image, answers: dict) -> None:
    for name, theirs in NAMES.items():
        for i, magnitude in enumerate(MAGNITUDES.get(name, (0.0,))):
            made = _apply_op(image, theirs, float(magnitude), InterpolationMode.NEAREST, fill=None)
            answers[f"op_{name}_{i}"] = np.asarray(made)
    policy = AutoAugment()
    back = {theirs: name for name, theirs in NAMES.items()}
    answers["autoaugment"] = np.array([
        [[list(NAMES).index(back[name]), probability, level or 0] for name, probability, level in pair]
        for pair in policy.policies
    ])  # fmt: skip
    for which, space, bins in (("auto", policy._augmentation_space(10, (32, 40)), 10),
                               ("rand", RandAugment()._augmentation_space(31, (32, 40)), 31)):  # fmt: skip
        for theirs, (levels, _) in space.items():
            answers[f"levels_{which}_{back[theirs]}"] = np.broadcast_to(levels.numpy(), bins).astype(
                np.float64
            )
    answers["signed"] = np.array([back[name] for name, (_, signed) in space.items() if signed])
    answers["randaugment"] = np.array([back[name] for name in space])
    draw = np.random.default_rng(1)
    answers["policy_draws"] = draw.random((25, 6)).astype(np.float32)
    for i, d in enumerate(answers["policy_draws"]):
        params = (i, torch.from_numpy(d[1:3]), torch.from_numpy((d[3:5] >= 0.5).astype(np.int64)))
        with patch.object(AutoAugment, "get_params", staticmethod(lambda _, params=params: params)):
            answers[f"autoaugment_{i}"] = np.asarray(policy(image))
    for i, d in enumerate(answers["policy_draws"][:12]):
        # an unsigned operation leaves its sign undrawn: hand the signs out by what is asked for
        rest = [(int(d[0] * 14), d[1] < 0.5), (int(d[2] * 14), d[3] < 0.5)]
        current = []

        def by_kind(high, _size, rest=rest, current=current):
            if high == 14:
                current[:] = rest.pop(0)
            return torch.tensor([int(current[high == 2])])

        with patch.object(torch, "randint", by_kind):
            answers[f"randaugment_{i}"] = np.asarray(RandAugment()(image))


def mixing(answers: dict) -> None:
    images = torch.from_numpy(np.stack([np.array(photo(12, 12, seed=i)) for i in range(4)])).permute(
        0, 3, 1, 2
    )
    mix = v2.MixUp(alpha=0.2, num_classes=5)
    with patch.object(mix, "_dist", type("Fixed", (), {"sample": lambda self, _: torch.tensor([0.3])})()):
        made, labels = mix(images / 255, torch.tensor([0, 3, 3, 1]))
    answers |= {"mix_images": images.numpy(), "mixed": made.numpy(), "mixed_labels": labels.numpy()}


def logits(image, answers: dict) -> None:
    """must agree to 1e-5 from one state dict; a fill that both can make stands for it in the recorded answer."""
    theirs = torchvision.models.resnet50(weights=None).eval()
    torch.manual_seed(0)
    fill(theirs)
    ours = resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    normalised = F.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        one, two = ours(x), theirs(normalised)
    print(
        f"logits reach {two.abs().max():.3f}; ours and torchvision's differ by at most {(one - two).abs().max():.2e}"
    )
    assert (one - two).abs().max() < 1e-5
    answers["logits"] = two.numpy()


def main() -> None:
    image = photo(40, 32)
    answers: dict = {"image": np.array(image), "crops": np.array(CROPS)}
    answers["magnitudes"] = np.array(
        [f"{n} {i} {m}" for n, ms in MAGNITUDES.items() for i, m in enumerate(ms)]
    )
    boxes(answers)
    geometry(image, answers)
    policies(image, answers)
    mixing(answers)
    logits(image, answers)
    answers["versions"] = np.array([torch.__version__, torchvision.__version__])
    np.savez_compressed(OUT, **answers)
    print(OUT, f"{OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
