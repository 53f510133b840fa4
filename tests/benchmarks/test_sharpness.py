"""The sharpness benchmark from end to end on a small network in a large one's place; its figures mean nothing."""

import json

import torch
from torch import nn

from benchmarks import sharpness
from benchmarks.sharpness_subjects import Subject


def tiny(examples, epochs, data_dir, device) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    batch = (torch.rand(examples, 1, 6, 6, device=device), torch.randint(0, 8, (examples,), device=device))
    return Subject("tiny", model.to(device).eval(), batch, 2**30)


def test_a_large_subject(tmp_path, monkeypatch):
    monkeypatch.setitem(sharpness.SUBJECTS, "resnet18", (tiny, 24, 1))
    file = tmp_path / "figures.json"
    words = [
        "--subject",
        "resnet18",
        "--peer-seconds",
        "2",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    sharpness.main(words)
    names = [row["name"] for row in json.loads(file.read_text())["rows"]]
    assert {
        "trace to 1 %",
        "density",
        "together",
        "product kept in gradients",
        "pyhessian in gradients",
    } <= set(names)
