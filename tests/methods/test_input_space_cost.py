"""What a step of a method in input space costs, and how deep it is, counted from the operators that it runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods import method_of
from conadv_lab.models.norm import mixture_batch_norm
from tests.conftest import image_set, small_cnn

BATCH = 16
FIRST, SECOND = (6, 2, 3, 3), (8, 6, 3, 3)
"""Weights of the two convolutions."""


class Counter(TorchDispatchMode):
    """Counts forwards, input gradients and weight gradients of images, and how many gradients follow one another.

    A value is as deep as the deepest that it was made of; what the first convolution's backward makes is one deeper.
    Depths belong to storages, as what is kept is written into views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thirds, self.depths, self.depth = 0, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        values = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        depth = max((self.depths.get(self.place(value), 0) for value in values), default=0)
        shapes = [tuple(value.shape) for value in values]
        if func is torch.ops.aten.convolution.default and shapes[1] == SECOND:
            self.thirds += shapes[0][0]
        if func is torch.ops.aten.convolution_backward.default and shapes[2] == SECOND:
            self.thirds += shapes[0][0] * sum(args[-1][:2])
        depth += func is torch.ops.aten.convolution_backward.default and shapes[2] == FIRST
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.depths[self.place(value)] = depth
        self.depth = max(self.depth, depth)
        return result

    @staticmethod
    def place(value: torch.Tensor) -> int:
        return value.untyped_storage().data_ptr()


def counted(name: str, options: dict) -> tuple[float, int, int]:
    """(cost over an image of B, depth, images taken from the stream) of a step in the middle of a run."""
    config = resolved(Config().replace(method=name, epsilon=0.1, **options))
    method, model = method_of(config), mixture_batch_norm(small_cnn())
    batch = round(BATCH * method.new_fraction)
    steps = Stream(
        image_set(50), seed=0, batch=batch, first_batch=max(BATCH, batch), steps=30, replays=method.replays
    )
    counter = Counter()
    for number in range(6):
        step = steps.step(number, method.lookahead)
        if number < 5:
            method.backward(model, step, torch.nn.CrossEntropyLoss())
        else:
            with counter:
                method.backward(model, step, torch.nn.CrossEntropyLoss())
    return counter.thirds / 3 / BATCH, counter.depth, batch


@pytest.mark.parametrize(
    ("name", "options", "cost", "depth"),
    [
        ("vanilla", {}, 1, 1),
        ("disadv", {}, 8 / 3, 2),
        ("conadv", {}, 8 / 3, 1),
        ("recycled", {}, 2, 1),
        ("advprop", {}, 2 + 10 / 3, 6),
        ("advprop", {"attack_steps": 1}, 8 / 3, 2),
        ("advprop", {"staleness": 1, "attack_steps": 3}, 4, 3),
        ("advprop", {"attack_target": "least-likely", "attack_steps": 2}, 10 / 3, 3),
        ("fast-advprop", {}, 1.5, 2),
        ("free-at", {}, 1, 1),
        ("fgsm-rs", {}, 5 / 3, 2),
        ("fgsm-rs", {"staleness": 2}, 5 / 3, 1),
    ],
)
def test_cost_and_depth_are_those_that_the_class_states(name, options, cost, depth):
    found = counted(name, options)
    method = method_of(resolved(Config().replace(method=name, **options)))
    assert found[:2] == (pytest.approx(cost), depth)
    assert (method.gradient_evaluations, method.depth) == (pytest.approx(cost), depth)


def test_fast_advprop_is_a_little_dearer_than_vanilla_on_its_own_images():
    cost, _, images = counted("fast-advprop", {})
    assert cost * BATCH / images == pytest.approx(1.2)
    assert cost * BATCH / images <= 1.35
