"""What is predicted before a run is sent: MLPerf's times, counted bytes, and the peak of a real step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conadv_lab import train
from conadv_lab.config import resolved
from conadv_lab.footprint import activations
from conadv_lab.methods import method_of
from conadv_lab.models.resnet import resnet50
from conadv_lab.plan import plan_of, times
from conadv_lab.recipes import RECIPES, digits, imagenet
from conadv_lab.staleness import simulate
from conadv_lab.staleness.__main__ import main as staleness
from conadv_lab.staleness.timeline.cluster import load
from conadv_lab.staleness.timeline.workload import workload_of

ROOT = Path(__file__).parents[1]


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


def test_layers_that_look_at_values_are_run():
    class Looks(nn.Module):
        def forward(self, x):
            return (x * 2 if x.mean().item() > 0 else x).exp()

    network = nn.Sequential(nn.Linear(8, 8), Looks())
    assert activations(network, (8,)) == 4 * (8 + 8)


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
    assert one.memory["activations"] == many.memory["activations"]
    assert one.peak() == sum(one.memory.values()) + sum(one.host.values())
    assert plan_of(recipe.replace(method="vanilla"), 8).memory["pending attacks"] == 0
    recycled = plan_of(recipe.replace(method="recycled"), 8).memory["pending attacks"]
    assert recycled == one.memory["pending attacks"]  # two steps' signs as well


PLACED = ({}, {"placement": "stream"}, {"placement": "ranks", "attackers": 16})


@pytest.mark.parametrize("options", [{"method": "vanilla"}, {"method": "recycled"}, *PLACED], ids=str)
def test_the_plans_time_is_the_simulators(options):
    recipe = imagenet.resnet50_96k().replace(**{"method": "conadv", **options})
    planned = times(resolved(recipe), method_of(resolved(recipe)), 64)
    where = {name: options[name] for name in ("placement", "attackers") if name in options}
    (row,) = simulate("h100", recipe, recipe.method.method, devices=64, **where).to_dict("records")
    assert (planned["step_ms"], planned["minutes"]) == (row["step_ms"], 60 * row["hours"])
    assert planned["steps"] == 1_173


def test_each_step_of_an_attack_takes_its_time():
    recipe = imagenet.resnet50_96k().replace(method="disadv", weights=(1, 1))
    one, three = (
        times(config, method_of(config), 64)["step_ms"]
        for config in (resolved(recipe), resolved(recipe.replace(attack_steps=3)))
    )
    a, c = load("h100").of("resnet50").fixed_ms, load("h100").of("resnet50").image_ms
    attack = 12 * 0.6 * a + 1_536 * 2 / 3 * c  # without stragglers, which stretch all alike
    assert three - one == pytest.approx(2 * attack, rel=0.05)


def test_equal_cost_forms_take_twice_the_steps_of_a_micro_batch_twice_as_large():
    """Half the clean images a step: as many epochs are twice as many steps, each as long as half the passes' a."""
    recipe = resolved(imagenet.resnet50_96k().replace(method="recycled-equal"))
    vanilla, equal = (
        times(one, method_of(one), 8)
        for one in (resolved(recipe.replace(method="vanilla", weights=None)), recipe)
    )
    assert equal["steps"] == pytest.approx(2 * vanilla["steps"], abs=1)
    a = load("h100").of("resnet50").fixed_ms
    assert vanilla["step_ms"] - equal["step_ms"] == pytest.approx(48 * a, rel=0.05)


def test_attackers_leave_more_images_to_those_that_train():
    """48 trainers of 64 devices: 98,304 / 48 images each; signs arrive, and wait, on the host."""
    recipe = imagenet.resnet50_96k().replace(method="conadv", pixels=64)
    alone, placed = plan_of(recipe, 64), plan_of(recipe.replace(placement="ranks", attackers=16), 64)
    assert (placed.images, placed.attackers, placed.attacked) == (2_048, 16, 6_144)
    assert placed.host["pending attacks"] == alone.memory["pending attacks"] * 64 / 48
    assert "pending attacks" not in placed.memory
    assert placed.network < alone.network
    with pytest.raises(
        ValueError, match=r"devices is 16; allowed: 17 to 98320, the attackers and the clean images"
    ):
        plan_of(recipe.replace(placement="ranks", attackers=16), 16)


def test_what_several_devices_and_averaged_weights_take_more():
    recipe = digits.conadv().replace(micro_batch=32)
    one, two = plan_of(recipe, 1).memory, plan_of(recipe, 2).memory
    assert two.keys() - one.keys() == {"gradient buckets"}
    assert two["gradient buckets"] * 2 == one["gradients and optimiser"]  # these and the momentum
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
        "MB sent per device",
    ):
        assert word in out
    assert "no prediction for this model, image size and precision" in out
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_time_of_a_step_and_of_the_run(capsys):
    words = ["imagenet-resnet50-96k", "--method", "conadv", "--placement", "ranks", "--attackers", "16"]
    assert train.main([*words, "--plan", "--devices", "64"]) == 0
    out = capsys.readouterr().out
    assert "2,048 clean, in 16 micro-batches of 128" in out
    assert "16, each attacks 6,144 images per step" in out
    assert re.search(
        r"^step +\d+\.\d ms on H100s\nwhole run +\d+\.\d minutes on H100s, 1,173 steps$", out, re.MULTILINE
    )
    assert train.main([*words, "--plan"]) == 2


@pytest.mark.slow
def test_a_step_takes_the_memory_that_was_predicted(tmp_path):
    """The benchmark in small; at batch 98,304 it is run by hand, and must keep within 10 %."""
    words = ["--batch", "24", "--micro-batch", "12", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "benchmarks.imagenet_96k", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["peak"]["ratio"] == pytest.approx(1, abs=0.15)
    assert 1.5 < rows["adversarial loss"]["value"] < 4


@pytest.mark.parametrize("method", [pytest.param("disadv", marks=pytest.mark.slow), "conadv"])
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("imagenet-resnet50-4k", marks=pytest.mark.slow),
        pytest.param("imagenet-resnet50-32k", marks=pytest.mark.slow),
        "imagenet-resnet50-96k",
    ],
)
def test_the_plan_and_the_timeline_print_the_same_step_time(recipe, method, capsys, tmp_path):
    """Micro-batch, gradients and precision come from the recipe, wherever it is asked of."""
    assert train.main([recipe, "--method", method, "--plan", "--devices", "64"]) == 0
    told = re.search(r"^step +([\d,.]+) ms on H100s$", capsys.readouterr().out, re.MULTILINE)
    rows = tmp_path / "rows.json"
    words = ["timeline", "--recipe", recipe, "--method", method, "--devices", "64", "--json", str(rows)]
    assert staleness(words) == 0
    (row,) = json.loads(rows.read_text())["rows"]
    assert told[1] == f"{row['step_ms']:,.1f}"
    workload = workload_of(recipe)
    config = RECIPES[recipe]()
    assert workload.micro_batch == config.training.micro_batch
    assert workload.precision == config.model.precision
    assert workload.bytes_each == 4  # weights and their gradients are float32, also under autocast
