"""Landscapes against the loss itself, and that they resume and leave everything alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.measures.landscape import between, filter_normalised, landscape, random_direction
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.journal import Journal
from tests.sharpness.conftest import cnn, mlp, ragged_batches

BATCHES = ragged_batches("cnn")


def loss_at(model, vector):
    parts, start = {}, 0
    for name, p in model.named_parameters():
        parts[name] = vector[start : start + p.numel()].view_as(p)
        start += p.numel()
    x, y = (torch.cat(part) for part in zip(*BATCHES, strict=True))
    return float(cross_entropy(torch.func.functional_call(model.eval(), parts, (x,)), y))


def test_every_cell_is_the_loss_at_its_place():
    model = cnn().double()
    problem = Problem(model, nn.CrossEntropyLoss(), BATCHES)
    first, second = random_direction(problem, 0, 0), random_direction(problem, 0, 1)
    found = landscape(problem, [first, second], [[-0.5, 0.0, 0.3, 1.0], [-1.0, 0.2]])
    assert found.losses.shape == (4, 2)
    for i, a in enumerate(found.axes[0]):
        for j, b in enumerate(found.axes[1]):
            truth = loss_at(model, problem.weights() + a * first + b * second)
            assert found.losses[i, j] == pytest.approx(truth, rel=1e-12)


def test_directions_are_filter_normalised_and_differ():
    problem = Problem(cnn().double(), nn.CrossEntropyLoss(), BATCHES)
    first, second = random_direction(problem, 0, 0), random_direction(problem, 0, 1)
    assert float((first @ second).abs()) < 0.7 * float(first.norm() * second.norm())
    assert float((first @ problem.weights()).abs()) < 0.5 * float(first.norm() * problem.weights().norm())
    for weight, part in zip(problem.split(problem.weights()), problem.split(first), strict=True):
        if weight.ndim > 1:
            torch.testing.assert_close(part.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        else:
            assert not part.any()
    torch.testing.assert_close(filter_normalised(problem, first * 7), first)


def test_a_line_between_two_solutions_ends_in_them():
    first, second = cnn().double(), cnn().double()
    with torch.no_grad():
        for p in second.parameters():
            p.add_(0.1)
        second[1].running_mean.add_(0.3)
    problems = [Problem(m, nn.CrossEntropyLoss(), BATCHES) for m in (first, second)]
    found = between(*problems, [0.0, 0.5, 1.0])
    assert found.losses[0] == pytest.approx(problems[0].value(), rel=1e-12)
    assert found.losses[2] == pytest.approx(problems[1].value(), rel=1e-12)
    assert found.losses[1] not in found.losses[[0, 2]]
    with pytest.raises(ValueError, match="those of the first"):
        between(problems[0], Problem(mlp().double(), nn.CrossEntropyLoss(), BATCHES), [0.0])


def test_an_interrupted_line_goes_on(tmp_path, monkeypatch):
    problems = [Problem(mlp().double(), nn.CrossEntropyLoss(), BATCHES) for _ in range(2)]
    value, calls = Problem.value, []

    def counting(self, point):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return value(self, point)

    monkeypatch.setattr(Problem, "value", counting)
    with pytest.raises(KeyboardInterrupt):
        between(*problems, [0.0, 0.5, 1.0], journal=Journal(tmp_path, every=0))
    found = between(*problems, [0.0, 0.5, 1.0], journal=Journal(tmp_path, every=0))
    assert len(calls) == 4
    assert found.losses == pytest.approx([value(problems[0])] * 3)


def test_an_interrupted_landscape_goes_on(tmp_path):
    problem = Problem(cnn().double(), nn.CrossEntropyLoss(), BATCHES)
    direction, axis = random_direction(problem), np.linspace(-1, 1, 7)
    whole = landscape(problem, [direction], [axis])
    value, calls = problem.value, []

    def failing(point):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return value(point)

    problem.value = failing
    with pytest.raises(KeyboardInterrupt):
        landscape(problem, [direction], [axis], journal=Journal(tmp_path, every=0))
    calls.clear()
    problem.value = lambda point: calls.append(1) or value(point)
    found = landscape(problem, [direction], [axis], journal=Journal(tmp_path, every=0))
    assert len(calls) == 4
    assert np.array_equal(found.losses, whole.losses)


def test_measured_landscapes_are_lowest_where_they_should_be():
    batches = ragged_batches("mlp", torch.float32)
    report = measure(mlp(), nn.CrossEntropyLoss(), batches, ("landscape_line", "landscape_eigen"))
    line = np.array(report["landscape_line"].value["losses"])
    assert line[10] == pytest.approx(report.conditions["loss_value"], rel=1e-6)
    plane = np.array(report["landscape_eigen"].value["losses"])
    rise = (plane[14, 7] + plane[0, 7]) / 2 - plane[7, 7]
    assert 0.3 < rise < 3
