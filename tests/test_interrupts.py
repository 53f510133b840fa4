"""Interrupting a notebook's cell leaves model and folder sound, and what is there can be gone on from."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conadv_lab import checkpoints, displays, files
from conadv_lab.files import write_json
from conadv_lab.runs import RunFolder
from conadv_lab.sharpness import measure
from conadv_lab.sharpness.measures import progress
from conadv_lab.training.loop import train
from tests.training.test_loop import tiny

BATCHES = [(torch.randn(12, 3, 8, 8), torch.randint(0, 3, (12,))) for _ in range(2)]
WANTED = ("top_eigenvalue", "trace", "sam_worst", "layer_traces", "landscape_line")


class InterruptedLoss(nn.CrossEntropyLoss):
    """Raises ``KeyboardInterrupt`` at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().forward(input, target)


def model_with_modes() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 3)
    )
    model.train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    return model


def state_of(model: nn.Module) -> tuple:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return tensors, modes, wanted, hooks


@pytest.mark.parametrize("at", [1, 7, 30, 60, 90])
def test_an_interrupted_measurement_leaves_the_model_as_it_was(at, tmp_path):
    model = model_with_modes()
    tensors, *rest = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        measure(
            model, InterruptedLoss(at), BATCHES, WANTED, resume=tmp_path, ascent_steps=3, probes=2, steps=6
        )
    after, *others = state_of(model)
    assert others == rest
    assert all(torch.equal(tensors[name], tensor) for name, tensor in after.items())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["write_synced", "sync_folder"])
def test_a_run_interrupted_while_it_saves_leaves_whole_files(name, tmp_path, monkeypatch):
    whole = train(tiny(), tmp_path / "whole", progress="none").result()
    original, calls = getattr(checkpoints, name), []

    def interrupted(path, *content):
        calls.append(path)
        original(path, *(part[: len(part) // 2] for part in content))
        if ".partial-00000008" in str(path):
            raise KeyboardInterrupt
        if content:
            original(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run", progress="none")
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.committed()] == ["step_00000004"]
    assert not list(folder.path.rglob(".partial-*"))
    for path in folder.path.rglob("*.json"):
        json.loads(path.read_text())
    assert folder.load_checkpoint() is not None
    resumed = train(tiny(), folder.path, resume=True, progress="none").result()
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]


def test_a_file_that_was_being_written_is_removed(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def interrupted(path, content):
        path.write_bytes(content[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_synced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_notebook_gets_one_bar_in_place_of_lines(monkeypatch, capsys):
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    assert not displays.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert displays.in_notebook()
    shown = []
    bar = SimpleNamespace(
        set_description=lambda text: shown.append(text),
        update=lambda price: shown.append(price),
        close=lambda: shown.append("closed"),
    )
    monkeypatch.setattr(progress, "_bar", lambda total: bar)
    measure(model_with_modes(), nn.CrossEntropyLoss(), BATCHES, ("trace", "batch_sharpness"), progress=True)
    assert shown == ["trace", 27, "batch_sharpness", 3, "closed"]
    assert capsys.readouterr().err == ""
