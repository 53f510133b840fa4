"""Measures on normalised logits need classes."""

import warnings

import pytest
import torch
from torch import nn

from conadv_lab.sharpness.measures.front import DEFAULT, measure
from conadv_lab.sharpness.problem.problem import Problem
from tests.sharpness.zoo import N, real, small

NAME = "adaptive_worst_logit_normalised"
QUICK = {"draws": 2, "ascent_steps": 1, "probes": 2, "steps": 4, "max_samples": 32}
LABELS = torch.arange(N) % 2
NO_CLASSES = {
    "regression": (small(outputs=1), nn.MSELoss(), real(N, 1)),
    "regression of three numbers": (small(), nn.MSELoss(), real(N, 3)),
    "a logit": (small(outputs=1), nn.BCEWithLogitsLoss(), LABELS[:, None].double()),
    "two classes": (small(outputs=2), nn.CrossEntropyLoss(), LABELS),
    "labels beside one another": (small(), nn.BCEWithLogitsLoss(), real(N, 3).sigmoid()),
    "positions on axis 1": (
        nn.Sequential(small(outputs=12), nn.Unflatten(1, (4, 3))),
        lambda f, y: nn.functional.cross_entropy(f.flatten(0, 1), y.flatten()),
        torch.arange(4 * N).view(N, 4) % 3,
    ),
}


@pytest.mark.parametrize("name", NO_CLASSES)
def test_without_classes_it_is_refused_when_asked_for(name):
    model, criterion, y = NO_CLASSES[name]
    report = measure(model, criterion, (real(N, 4), y), **QUICK)
    assert [m.name for m in report.measures] == [*DEFAULT]
    told: dict[str, ValueError] = {}
    report = measure(model, criterion, (real(N, 4), y), ("trace", NAME), refused=told.__setitem__, **QUICK)
    assert [m.name for m in report.measures] == ["trace"]
    assert str(told[NAME]).startswith(f"{NAME} needs outputs of at least 3 classes")
    for asked in (NAME, "sam_average_logit_normalised"):
        with pytest.raises(ValueError, match=f"{asked} needs .* use {asked.partition('_logit')[0]}"):
            measure(model, criterion, (real(N, 4), y), (asked,))


@pytest.mark.parametrize("y", [torch.arange(N) % 3, real(N, 3).softmax(1)])
def test_with_classes_it_is_measured(y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure(small(), nn.CrossEntropyLoss(), (real(N, 4), y), (NAME,), **QUICK)
    assert report[NAME].value[0.5] > 0
    assert Problem(small(), nn.CrossEntropyLoss(), (real(N, 4), y)).classes == 3
