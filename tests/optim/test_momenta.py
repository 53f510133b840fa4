"""torch's fused SGD, which also a CPU has, where some weights have their first gradient in a later step."""

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.families.controls import Copy, Noise
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.optim.momenta import begin_momenta
from tests.conftest import image_set, small_cnn

LATE = {
    "recycled": lambda: Recycled(0.1),
    "recycled-equal": lambda: Recycled(0.1, equal_cost=True),
    "noise-equal": lambda: Noise(0.1, equal_cost=True),
    "copy-equal": lambda: Copy(equal_cost=True),
    "conadv": lambda: ConAdv(SignAttack(0.1), staleness=2, first="clean"),
}


def trained(method, fused: bool, hook: bool = True) -> nn.Module:
    model, batch = mixture_batch_norm(small_cnn().double()), round(16 * method.clean_fraction)
    steps = Stream(
        image_set(64),
        seed=0,
        batch=batch,
        first_batch=16,
        steps=6,
        augment=lambda images, *_: images.double(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused)
    if hook:
        optimizer.register_step_pre_hook(begin_momenta)
    for number in range(6):
        method.backward(model, steps.step(number, method.lookahead), nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", LATE)
def test_fused_sgd_is_sgd(name):
    plain = trained(LATE[name](), fused=False, hook=False).state_dict()
    for key, value in trained(LATE[name](), fused=True).state_dict().items():
        torch.testing.assert_close(value, plain[key], rtol=0, atol=1e-12, msg=key)


def test_without_the_hook_torch_refuses():
    with pytest.raises(TypeError, match="NoneType"):
        trained(Recycled(0.1), fused=True, hook=False)
