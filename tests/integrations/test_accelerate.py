"""Accelerate: the steps of our own loop, and states that keep what is pending."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conadv_lab as cl
from conadv_lab.integrations.accelerate import look_ahead
from tests.conftest import small_cnn
from tests.integrations.conftest import assert_equal_parameters
from tests.integrations.five_steps import GROUP, STEPS, converted, method, optimizer

accelerate = pytest.importorskip("accelerate", reason="the extra [adapters] is not installed")


def trained(accelerator, model, sgd, ours, loader, until: int, saved=None, loaded=None, accumulate: int = 1):
    model, sgd, loader = accelerator.prepare(model, sgd, loader)
    ahead = look_ahead(accelerator, loader, ours, accumulate=accumulate)
    if loaded is not None:
        accelerator.load_state(str(loaded))
    while ahead.trained < until:
        for step in ahead:
            ours.backward(model, step, nn.functional.cross_entropy)
            sgd.step()
            sgd.zero_grad()
            ahead.done(step)
            if ahead.trained == until:
                break
    if saved is not None:
        accelerator.save_state(str(saved))
    return accelerator.unwrap_model(model)


def test_five_steps_are_those_of_our_loop(ours, batches):
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    model = converted()
    loader = DataLoader(data, batch_size=GROUP)
    model = trained(
        accelerate.Accelerator(cpu=True), model, optimizer(model), method(), loader, STEPS, accumulate=2
    )
    assert_equal_parameters(model, ours)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_state_goes_on_bitwise(stop, tmp_path):
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(16, 2, 6, 6, generator=draw), torch.randint(0, 4, (16,), generator=draw))

    def run(until: int, seed: int, **places):
        torch.manual_seed(seed)
        model = cl.mixture_batch_norm(small_cnn())
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ours = cl.ConAdv(cl.SignAttack(0.1), staleness=2)
        loader = DataLoader(data, batch_size=4, shuffle=True)
        return trained(
            accelerate.Accelerator(cpu=True), model, sgd, ours, loader, until, **places
        ).state_dict()

    whole = run(7, 1)
    run(stop, 1, saved=tmp_path / "state")
    resumed = run(7, 2, loaded=tmp_path / "state")
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_accumulation_by_accelerate_and_swapped_arguments_are_refused():
    accelerator, loader = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), [()]
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps is 2; .* look_ahead\(…, accumulate=2\)"
    ):
        look_ahead(accelerator, loader, method())
    with pytest.raises(ValueError, match=r"accelerator is a list; allowed: an accelerate\.Accelerator"):
        look_ahead(loader, accelerator, method())
