"""Every measure on a GPU gives what it gives on the CPU, and the command runs there. Skipped without one."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from conadv_lab.config import Config
from conadv_lab.sharpness import measure
from conadv_lab.sharpness.__main__ import main
from conadv_lab.sharpness.measures.front import names
from conadv_lab.sharpness.measures.landscape import between
from conadv_lab.sharpness.operators.matrices import GGN, EmpiricalFisher, Fisher, Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import cross_check
from conadv_lab.sharpness.spectrum.journal import Journal
from conadv_lab.training.loop import train

from .conftest import QUICK, cnn, fitted, ragged_batches

pytestmark = pytest.mark.gpu
ACTS = {"ReLU": nn.ReLU, "GELU": nn.GELU}
CHAOTIC = {"keskar": 1e-2, "keskar_subspace": 1e-2}
"""Measures whose search takes another way at the least rounding."""


def subject(act: str, device: str) -> tuple[nn.Module, list]:
    """Trained on the CPU and in float64, so that both devices hold the same weights."""
    model, batches = fitted(ACTS[act])
    model = model.double().to(device)
    return model, [(x.double().to(device), y.to(device)) for x, y in batches]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield float(value)
    elif value is not None:
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)


def measured(act: str, device: str, name: str, **more: Any) -> Any:
    model, batches = subject(act, device)
    told = {"learning_rate": 0.1}
    return measure(model, nn.CrossEntropyLoss(), batches, (name,), facts=told, **QUICK | more)[name]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", names())
def test_measures(name, act):
    here, there = (measured(act, device, name) for device in ("cpu", "cuda"))
    found, expected = (torch.tensor([*numbers(m.value)]) for m in (there, here))
    torch.testing.assert_close(found, expected, rtol=CHAOTIC.get(name, 1e-4), atol=1e-7)
    assert there.conditions["data_hash"] == here.conditions["data_hash"]


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher, EmpiricalFisher])
def test_products_in_float32_have_its_digits(kind):
    """And not TF32's, with which a convolution's are off by 1e-3; of kept graphs and streamed ones."""
    model, batches = cnn().eval().to("cuda"), ragged_batches("cnn", torch.float32)
    exact = kind(Problem(model, nn.CrossEntropyLoss(), batches, dtype=torch.float64))
    vector = torch.randn(exact.size, generator=torch.Generator().manual_seed(0)).cuda()
    for budget in (0, 2**30):
        product = kind(Problem(model, nn.CrossEntropyLoss(), batches), memory_budget=budget) @ vector
        truth = exact @ vector.double()
        assert (product - truth).norm() < 1e-5 * truth.norm()


def test_batches_that_lie_on_the_host():
    model, batches = fitted(device="cuda")
    host = [(x.cpu(), y.cpu()) for x, y in batches]
    loss = nn.CrossEntropyLoss()
    found = [measure(model, loss, b, ("trace",))["trace"].value for b in (batches, host)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_nothing_is_changed():
    model, batches = fitted(device="cuda")
    torch.cuda.manual_seed(3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.cuda.get_rng_state()
    allowed = torch.backends.cudnn.allow_tf32
    measure(model, nn.CrossEntropyLoss(), batches, ("top_eigenvalue", "sam_worst"), **QUICK)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batches", [1, 3])
def test_the_cross_check(batches):
    model, data = fitted(device="cuda")
    check = cross_check(Problem(model, nn.CrossEntropyLoss(), data[:batches]), samples=3)
    assert check.product_difference < 1e-4


def test_a_line_between_solutions_on_two_devices():
    first, second = (Problem(*_with_loss(*subject("GELU", device))) for device in ("cuda", "cpu"))
    found = between(first, first, [0.0, 1.0]).losses
    assert found.tolist() == pytest.approx([second.initial_loss] * 2)


def _with_loss(model: nn.Module, batches: list) -> tuple:
    return model, nn.CrossEntropyLoss(), batches


@pytest.mark.parametrize("name", ["density", "trace", "landscape_line"])
def test_resuming(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "due", property(lambda self: self.folder is not None))
    first = measured("GELU", "cuda", name, resume=tmp_path)
    (tmp_path / f"measure-{name}.pt").unlink()
    again = measured("GELU", "cuda", name, resume=tmp_path)
    assert [*numbers(again.value)] == pytest.approx([*numbers(first.value)], rel=1e-6)


STRANGER = """
import torch
from torch import nn

def subject():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to("cuda")
    batches = [(torch.randn(20, 6), torch.randint(0, 3, (20,))) for _ in range(4)]
    return model, nn.CrossEntropyLoss(), batches
"""


def test_the_command_on_a_strangers_model(tmp_path, capsys):
    (tmp_path / "stranger.py").write_text(STRANGER)
    assert (
        main([f"{tmp_path / 'stranger.py'}:subject", "--cross-check", "--measures", "top_eigenvalue,trace"])
        == 0
    ), capsys.readouterr().err
    assert "PyHessian" in capsys.readouterr().out


def test_the_command_on_a_run(tmp_path, capsys):
    config = Config().replace(epochs=1.0, global_batch=128, device="cuda", bn_recalibrate=128)
    run = train(config, tmp_path / "run", progress="none").path
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "csv")}
    words = [str(run), "--examples", "64", "--line-to", str(run)]
    words += ["--measures", "top_eigenvalue,density,sam_worst", "--set", "steps=8", "--set", "probes=2"]
    words += ["--resume", str(tmp_path / "kept"), "--figures", str(tmp_path / "figures")]
    words += [word for kind, path in out.items() for word in (f"--{kind}", str(path))]
    assert main(words) == 0, capsys.readouterr().err
    measures = json.loads(out["json"].read_text())["measures"]
    assert "landscape_between" in {m["name"] for m in measures}
    assert out["html"].stat().st_size > 10_000
    before = capsys.readouterr().out
    assert main(words) == 0  # from what is kept
    assert capsys.readouterr().out.splitlines()[:4] == before.splitlines()[:4]
