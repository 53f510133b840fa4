"""The LARS benchmark compares the right thing."""

import pytest
import torch

from benchmarks.lars import SETTINGS, LoopLARS, resnet50_shapes
from conadv_lab.optim.lars import LARS


def test_shapes_are_those_of_resnet50():
    shapes = resnet50_shapes()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032


@pytest.mark.parametrize("adapt", [True, False])
def test_the_loop_takes_the_same_steps(adapt):
    ours, theirs = (torch.nn.Parameter(torch.arange(1.0, 13).view(3, 4)) for _ in range(2))
    steps = [
        kind([{"params": [param], "adapt": adapt}], **SETTINGS | {"weight_decay": 0.5 * adapt})
        for kind, param in ((LARS, ours), (LoopLARS, theirs))
    ]
    for _ in range(3):
        for param, optimizer in zip((ours, theirs), steps, strict=True):
            param.grad = param.detach().cos()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, torch.arange(1.0, 13).view(3, 4), rtol=1e-6, atol=0)
