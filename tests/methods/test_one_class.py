"""A method is one class: whatever names, prices, predicts or draws a method takes it from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conadv_lab.config import Config, resolved
from conadv_lab.frames import collect
from conadv_lab.intervals import over_seeds
from conadv_lab.methods import METHODS, method_of
from conadv_lab.plan import plan_of
from conadv_lab.plots import figure_against_batch, look_of
from conadv_lab.recipes.digits import vanilla
from conadv_lab.staleness.timeline.cluster import Attack, Cluster, Compute, Network
from conadv_lab.staleness.timeline.step_times import step_times
from conadv_lab.staleness.timeline.workload import workload_of
from conadv_lab.training.loop import train

PACKAGE = Path(__file__).parents[2] / "conadv_lab"
CLASS = '''
from dataclasses import dataclass

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import norm, steps
from conadv_lab.mistakes import require


@dataclass(frozen=True)
class DampingOptions:
    """Of `damped`."""

    damping: float = 0.25
    """How much of the gradient is left."""

    def check(self) -> None:
        require(0 < self.damping <= 1, "damping", self.damping, "above 0, up to 1")


class Damped(Method):
    name, label, colour, marker = "damped", "Damped gradient", "#123456", "*"
    about = "B clean images, looked at twice before"
    reads = (DampingOptions,)
    side, side_steps = "ascent", 2

    def __init__(self, damping):
        self.damping = damping

    @classmethod
    def of(cls, config):
        return cls(config.method.damping)

    def kept_bytes(self, steps):
        return 0.5

    def backward(self, model, step, criterion):
        criterion = self.checked(model, step, criterion)
        with norm.one_update(model):
            return Losses(steps.train_on_clean(model, step, criterion, weight=self.damping))


def made(config):
    return Damped(0.5)
'''
LOOKS = """
import json, sys
import conadv_lab as cl
from conadv_lab.methods import METHODS
from conadv_lab.config import Config, methods_table, resolved
from conadv_lab import plots, train
from conadv_lab.staleness import simulate

assert "torch" not in sys.modules
config = Config().replace(method="damped", damping=0.75, global_batch=100, steps=2)
rows = simulate("h100", "imagenet-resnet50-1k", ["vanilla", "damped"], devices=1)
try:
    resolved(config.replace(damping=2.0))
except ValueError as mistake:
    refused = str(mistake)
assert "torch" not in sys.modules
from conadv_lab.plan import plan_of

words = ["--method", "damped", "--damping", "0.5", "--steps", "2", "--warmup-epochs", "0", "--out", "run"]
train.main(["digits-vanilla", *words])
print(json.dumps({
    "class": cl.Damped.__name__, "names": list(METHODS), "refused": refused, "table": methods_table(),
    "config": resolved(config).to_dict()["method"], "look": plots.look_of("damped"),
    "pending": plan_of(config).memory["pending attacks"], "compute": list(rows["compute_ms"]),
    "result": json.load(open("run/result.json")),
}))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The package with one file more."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(PACKAGE, house / "conadv_lab", ignore=shutil.ignore_patterns("__pycache__"))
    (house / "conadv_lab" / "methods" / "families" / "damping.py").write_text(CLASS)
    return house


def test_a_class_in_a_file_is_a_method_everywhere(house):
    ran = subprocess.run(
        [sys.executable, "-c", LOOKS], cwd=house, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["class"] == "Damped"
    assert set(found["names"]) == {*METHODS, "damped"}
    assert found["refused"] == "damping is 2.0; allowed: above 0, up to 1"
    assert found["config"]["damping"] == 0.75
    assert (
        "| `damped` | B clean images, looked at twice before | 3 | 3 | ours |" in found["table"].splitlines()
    )
    assert found["look"] == {
        "label": "Damped gradient",
        "color": "#123456",
        "marker": "*",
        "fillstyle": "full",
    }
    assert found["pending"] == 100 * 64 * 0.5
    assert found["compute"][1] == pytest.approx(3 * found["compute"][0])
    assert (found["result"]["gradient_evaluations"], found["result"]["depth"]) == (3.0, 3)


@pytest.mark.parametrize("words", [["digits-vanilla", "--help"], ["--list", "methods"]])
def test_its_help_is_there_without_torch(words, house):
    command = [sys.executable, "-X", "importtime", "-m", "conadv_lab.train", *words]
    ran = subprocess.run(command, cwd=house, capture_output=True, text=True, check=True)
    assert "damped" in ran.stdout
    assert "B clean images, looked at twice" in ran.stdout
    assert "--damping" in ran.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}


def test_a_users_own_file_has_the_same_rights(tmp_path):
    """The class as it is, without a place in the package: its options are the user's own affair."""
    own = tmp_path / "own.py"
    own.write_text(CLASS)
    config = vanilla().replace(method=f"{own}:made", global_batch=100, steps=2, warmup_epochs=0, threads=1)
    method = method_of(config)
    assert (method.gradient_evaluations, method.depth, method.label) == (3.0, 3, "Damped gradient")
    assert plan_of(config).memory["pending attacks"] == 100 * 64 * 0.5
    assert passes(method) == pytest.approx(3.0)
    train(config, tmp_path / "run", progress="none")
    rows = collect(str(tmp_path / "run"))
    assert rows[["gradient_evaluations", "depth"]].iloc[0].tolist() == [3.0, 3]
    own.unlink()  # figures read what the run has recorded, not a file that it names
    figure = {"label": "Damped gradient", "color": "#123456", "marker": "*", "fillstyle": "full"}
    assert look_of(config.method.method, rows) == figure
    labels = figure_against_batch(over_seeds(rows, "test_accuracy"), "test_accuracy", "%", spread="interval")
    assert labels.get_legend_handles_labels()[1] == ["Damped gradient"]


def passes(method) -> float:
    """Time of a step over a vanilla one's where time is arithmetic, as the simulator has it."""
    free = Network(node_gbs=1e12, card_gbs=1e12, model="alpha-beta", node_hop_us=0.0, network_hop_us=0.0)
    arithmetic = Cluster(
        "arithmetic", compute={"resnet50": Compute(0.0, 1.0)}, network=free, attack=Attack(0.0)
    )
    workload = workload_of("imagenet-resnet50-1k").replace(micro_batch=None)
    return (
        step_times(arithmetic, workload, method, 1).compute
        / step_times(arithmetic, workload, "vanilla", 1).compute
    )


@pytest.mark.parametrize("options", [{}, {"attack_steps": 3}, {"staleness": 0}, {"norm": "l2"}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_simulators_passes_are_the_cost(name, options):
    method = method_of(resolved(Config().replace(method=name, **options)))
    assert passes(method) == pytest.approx(method.gradient_evaluations, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("vanilla", {}, (1, 1, 1, 0, 0)),
        ("disadv", {}, (8 / 3, 2, 1, 0, 1 / 8)),
        ("disadv", {"attack_steps": 3}, (4, 4, 1, 0, 4)),
        ("conadv", {}, (8 / 3, 1, 1, 1, 2 / 8)),
        ("conadv", {"staleness": 4, "attack_steps": 3}, (4, 3, 1, 4, 20)),
        ("conadv", {"staleness": 0, "norm": "l2"}, (8 / 3, 2, 1, 0, 4)),
        ("recycled", {}, (2, 1, 1, 0, 2 / 8)),
        ("recycled-equal", {}, (1, 1, 0.5, 0, 2 / 8)),
        ("noise", {}, (2, 1, 1, 0, 0)),
        ("noise-equal", {}, (1, 1, 0.5, 0, 0)),
        ("copy", {}, (2, 1, 1, 0, 0)),
        ("copy-equal", {}, (1, 1, 0.5, 0, 0)),
        ("advprop", {}, (16 / 3, 6, 1, 0, 4)),
        ("advprop", {"attack_steps": 1}, (8 / 3, 2, 1, 0, 1 / 8)),
        ("advprop", {"staleness": 2, "attack_steps": 2}, (10 / 3, 2, 1, 2, 12)),
        ("advprop", {"attack_target": "random", "attack_steps": 1}, (8 / 3, 2, 1, 0, 4)),
        ("fast-advprop", {}, (1.5, 2, 1, 0, 0)),
        ("free-at", {}, (1, 1, 0, 0, 4)),
        ("fgsm-rs", {}, (5 / 3, 2, 0, 0, 1 / 8)),
        ("fgsm-rs", {"staleness": 1}, (5 / 3, 1, 0, 1, 2 / 8)),
    ],
)
def test_facts_are_those_of_the_semantics(name, options, facts):
    """docs/semantics.md, "Cost": (6 + 2k) / 3 with an attack of k steps, 2 with altered images, else 1; depth."""
    method = method_of(resolved(Config().replace(method=name, **options)))
    found = method.gradient_evaluations, method.depth, method.clean_fraction, method.lookahead
    assert (*found, method.kept_bytes(1000)) == facts
