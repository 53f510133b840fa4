"""What is predicted before a run is sent: MLPerf's times, counted bytes, and the peak of a real step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conadv_lab import train
from conadv_lab.footprint import activations
from conadv_lab.models.resnet import resnet50
from conadv_lab.plan import plan_of, step_ms
from conadv_lab.recipes import digits, imagenet

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("images", "measured"),
    [(400, 57.07), (200, 33.16), (100, 18.94), (50, 10.86), (40, 9.10), (42, 9.46), (16, 5.68)],
)
def test_step_times_are_within_what_is_said_of_mlperfs(images, measured):
    """mlcommons training_results v2.1 and v3.0, H100, medians of five runs."""
    assert -0.065 < step_ms(images) / measured - 1 < 0.07


def test_activations_are_counted_once_each():
    """Convolution and batch norm keep their inputs, the second norm's output is shared by ReLU and convolution."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 2, 1),
    )
    pixels = 6 * 6
    assert activations(net.train(), (3, 6, 6)) == 4 * pixels * (3 + 8 + 8)
    assert activations(net.double(), (3, 6, 6), torch.float64) == 8 * pixels * (3 + 8 + 8)


def test_resnet50_keeps_what_its_layers_say():
    """Inputs of 53 convolutions and of 53 norms, the pooling's indices (8 bytes), and the last features."""
    model, sizes = resnet50(10).train(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs: sizes.append((id(inputs[0]), inputs[0].numel(), inputs[0]))
            )
    model(torch.zeros(2, 3, 32, 32))
    at_least = sum({key: numel for key, numel, _ in sizes}.values()) * 4 / 2
    assert at_least <= activations(model, (3, 32, 32)) < 1.15 * at_least


def test_a_plan_adds_up():
    recipe = imagenet.resnet50_96k().replace(method="conadv")
    one, many = plan_of(recipe, 8), plan_of(recipe, 64)
    parameters = 25_557_032
    adversarial = 2 * 26_560  # the other branch's scales and shifts
    assert many.network == round(2 * 63 / 64 * 4 * (parameters + adversarial))
    assert (one.images, many.images) == (12_288, 1_536)
    assert one.memory["pending attacks"] == 2 * 12_288 * 3 * 224**2 / 8
    assert many.step_ms == pytest.approx(3.48 + 0.1434 * 1_536 * 8 / 3)
    assert one.memory["activations"] == many.memory["activations"]
    assert one.peak() == sum(one.memory.values()) + sum(one.host.values())
    assert plan_of(recipe.replace(method="vanilla"), 8).memory["pending attacks"] == 0
    recycled = plan_of(recipe.replace(method="recycled"), 8).memory["pending attacks"]
    assert recycled == one.memory["pending attacks"]  # two steps' signs as well


def test_what_several_devices_and_averaged_weights_take_more():
    recipe = digits.conadv().replace(micro_batch=32)
    one, two = plan_of(recipe, 1).memory, plan_of(recipe, 2).memory
    assert two.keys() - one.keys() == {"gradients on their way"}
    assert two["gradients on their way"] * 2 == one["gradients and optimiser"]  # these and the momentum
    averaged = plan_of(recipe.replace(ema=0.9), 1).memory
    assert averaged == one | {"averaged weights": one["weights"]}


def test_bfloat16_keeps_about_half():
    recipe = imagenet.resnet50_4k().replace(pixels=64)
    half, full = (plan_of(recipe.replace(precision=p)).memory["activations"] for p in ("bfloat16", "float32"))
    assert 0.45 < half / full < 0.65


@pytest.mark.parametrize(("devices", "allowed"), [(0, "1 to 256"), (257, "1 to 256")])
def test_impossible_numbers_of_devices(devices, allowed):
    with pytest.raises(ValueError, match=rf"devices is {devices}; allowed: {allowed}"):
        plan_of(digits.conadv(), devices)


def test_the_command_prints_the_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["imagenet-resnet50-4k", "--plan", "--devices", "16", "--method", "recycled", "--pixels", "64"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    for word in (
        "16 devices",
        "256 clean, in 4 micro-batches of 64",
        "device memory",
        "host memory",
        "MB sent by each",
    ):
        assert word in out
    assert "no prediction for this model and image size" in out
    assert list(tmp_path.iterdir()) == []


def test_a_step_takes_the_memory_that_was_predicted(tmp_path):
    """The benchmark in small; at batch 98,304 it is run by hand, and must keep within 10 %."""
    words = ["--batch", "24", "--micro-batch", "12", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "benchmarks.imagenet_96k", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["peak"]["ratio"] == pytest.approx(1, abs=0.15)
    assert 1.5 < rows["adversarial loss"]["value"] < 4
