"""Each mistake of a user is one clear sentence."""

import re

import pytest
import torch
from torch import nn

from conadv_lab.sharpness import Problem, measure
from tests.sharpness.conftest import mlp, ragged_batches

BATCHES = ragged_batches("mlp", torch.float32)


def broken(value: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[1].weight[0, 0] = value
    return model


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


MISTAKES = {
    "no parameters": ({"model": nn.Flatten()}, "has no parameters"),
    "a sum": ({"criterion": nn.CrossEntropyLoss(reduction="sum")}, "sums over the batch"),
    "no reduction": ({"criterion": nn.CrossEntropyLoss(reduction="none")}, "one number"),
    "empty": ({"batches": []}, "batches is empty"),
    "label": ({"batches": [(BATCHES[0][0], BATCHES[0][1] + 5)]}, "allowed: 0 to 4"),
    "negative label": ({"batches": [(BATCHES[0][0], BATCHES[0][1] - 9)]}, "in batch 0; allowed: 0 to 4"),
    "NaN": ({"model": broken(float("nan"))}, "'1.weight' contains NaN"),
    "infinite": ({"model": broken(float("inf"))}, "'1.weight' contains NaN"),
    "name": ({"params": ["3.wieght"]}, "Did you mean '3.weight'"),
    "unused": ({"model": Spare(), "params": ["spare"]}, "no effect on the loss"),
    "measure": ({"measures": ("top_eigenvalu",)}, "Did you mean 'top_eigenvalue'"),
    "setting": ({"tolerance": 1e-3}, "unknown setting 'tolerance'"),
    "bn": ({"bn": "evaluation"}, "Did you mean 'eval'"),
    "k": ({"k": 0, "measures": ("top_eigenvalues",)}, "k is 0"),
    "not batches": ({"batches": 3}, "batches is int"),
    "float labels": (
        {"batches": [(BATCHES[0][0], BATCHES[0][1].float())]},
        "the criterion fails on batch 0 (outputs float32 (",
    ),
    "another dtype": (
        {"batches": [(BATCHES[0][0].double(), BATCHES[0][1])]},
        "the model fails on batch 0 (inputs float64 (",
    ),
    "another shape": (
        {"batches": [(BATCHES[0][0].flatten(1)[:, :1], BATCHES[0][1])]},
        "the model fails on batch 0 (inputs",
    ),
    "no model": ({"model": None}, "the model is of type NoneType; allowed: a torch.nn.Module"),
    "no dtype": ({"dtype": "float64"}, "dtype is 'float64'; allowed: a torch.dtype"),
    "one radius": ({"rhos": 0.1}, "rhos is 0.1; allowed: a list of numbers"),
    "no radius": ({"rhos": ()}, "rhos is (); allowed: at least one number"),
    "half an eigenvalue": ({"k": 1.5}, "k is 1.5; allowed: a whole number"),
    "percent": ({"confidence": 95.0}, "confidence is 95.0; allowed: above 0 and below 1"),
    "no group": ({"m": 0}, "m is 0; allowed: a whole number of at least 1"),
    "negative epsilon": ({"epsilon": -1.0}, "epsilon is -1.0; allowed: 0 to 1"),
    "negative rate": (
        {"measures": ("lr_lambda_max",), "facts": {"learning_rate": -1}},
        "learning_rate -1; allowed: a number of at",
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_told(mistake):
    change, told = MISTAKES[mistake]
    arguments = {"model": mlp(), "criterion": nn.CrossEntropyLoss(), "batches": BATCHES} | change
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        measure(**arguments)
    assert "\n" not in str(caught.value)


def test_parameters_without_effect_are_left_out_aloud():
    with pytest.warns(UserWarning, match=r"left out \(no effect"):
        problem = Problem(Spare(), nn.CrossEntropyLoss(), BATCHES)
    assert problem.left_out == ("spare.weight", "spare.bias")
    assert problem.size == sum(p.numel() for p in mlp().parameters()) == len(problem.gradient)
