"""Compiled networks: each kind of forward is compiled once, however many micro-batches and steps there are."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from conadv_lab.data.loader import Stream
from conadv_lab.methods.adversarial import ConAdv, Copy, DisAdv, Recycled
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.training.network import Autocast
from tests.conftest import image_set, small_cnn

STEPS = 13

# The forwards are: main, adversarial, and the attack's with the batch's and, later, with running statistics.
CASES = {
    "vanilla": (Vanilla, 1),
    "disadv": (lambda: DisAdv(SignAttack(0.1)), 4),
    "conadv": (lambda: ConAdv(SignAttack(0.1), 2), 4),
    "recycled": (lambda: Recycled(0.1), 2),
    "copy": (lambda: Copy(), 2),
    "recycled-equal": (lambda: Recycled(0.1, equal_cost=True), 2),
}


def trained(network: nn.Module, model: nn.Module, method, micro_batch: int) -> nn.Module:
    batch = round(16 * method.clean_fraction)
    steps = Stream(
        image_set(64), seed=0, batch=batch, first_batch=16, steps=STEPS, micro_batch=min(micro_batch, batch)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(STEPS):
        method.backward(network, steps.step(number, method.lookahead), nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("name", CASES)
def test_no_forward_is_compiled_twice(name, micro_batch):
    make, kinds = CASES[name]
    torch.compiler.reset()
    counter = CompileCounter()
    model, plain = mixture_batch_norm(small_cnn()), mixture_batch_norm(small_cnn())
    compiled = torch.compile(Autocast(model, "cpu"), backend=counter, fullgraph=True)
    trained(compiled, model, make(), micro_batch)
    assert counter.frame_count == kinds
    trained(Autocast(plain, "cpu"), plain, make(), micro_batch)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
