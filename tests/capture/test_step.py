"""The captured step of other people's loops, and what is said where a step cannot be captured."""

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab.capture.choice import backend_of, reason_against
from conadv_lab.capture.feed import Copies
from conadv_lab.capture.step import CapturedStep
from conadv_lab.data.loader import Batch, Step
from conadv_lab.optim.rates import bind, plain_state, rates_on, take_over, why_not
from tests.capture.recording import Recordings
from tests.conftest import small_cnn

CRITERION = nn.CrossEntropyLoss()
CPU = torch.device("cpu")
CALLS = 26


def batches(count: int = CALLS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every fifth is shorter, as the last one of a loader's epoch is."""
    draw = torch.Generator().manual_seed(0)
    sizes = [4 if i % 5 == 4 else 8 for i in range(count)]
    return [
        (torch.rand(n, 2, 6, 6, generator=draw), torch.randint(0, 4, (n,), generator=draw)) for n in sizes
    ]


def made(optimizer: str = "lars"):
    model = cl.mixture_batch_norm(small_cnn())
    if optimizer == "lars":
        return model, cl.LARS(model.parameters(), lr=1.0)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def method():
    return cl.ConAdv(cl.SignAttack(epsilon=0.1), staleness=1)


def loop_by_hand(optimizer: str, rate_in_tensor: bool) -> nn.Module:
    model, updates = made(optimizer)
    if rate_in_tensor:  # in float32, as a captured step's
        updates.param_groups[0]["lr"] = torch.tensor(1.0)
    schedule, conadv = torch.optim.lr_scheduler.ExponentialLR(updates, 0.9), method()
    loader = [(images, labels) for images, labels in batches()]
    for step in cl.lookahead(loader, steps=CALLS, ahead=conadv.lookahead):
        conadv.backward(model, step, CRITERION)
        updates.step()
        updates.zero_grad()
        schedule.step()
    return model


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_batch_a_call_is_the_loop_by_hand(optimizer, recorded):
    """A look-ahead of one step, a scheduler, shorter batches, and the batch that is left at the end."""
    if recorded and optimizer == "sgd":
        pytest.skip("torch's plain SGD takes its learning rate from the host")
    model, updates = made(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(updates, 0.9)
    step = CapturedStep(model, method(), updates, CRITERION, batches(1)[0])
    backend = Recordings() if recorded else None
    if recorded:
        step._begin(model, method(), updates, CRITERION, CPU, backend, required=True)
    losses = []
    for images, labels in batches():
        losses.append(step(images, labels))
        if losses[-1] is not None:
            schedule.step()
    losses += list(step.rest())
    assert [loss is None for loss in losses] == [True] + [False] * CALLS
    assert backend is None or backend.replayed > 0
    compared = zip(model.parameters(), loop_by_hand(optimizer, recorded).parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in compared)


def test_on_needs_a_gpu_and_off_and_auto_do_not():
    model, updates = made()
    with pytest.raises(
        ValueError, match=r"capture is 'on', but the device is 'cpu', and only CUDA has graphs; allowed"
    ):
        CapturedStep(model, method(), updates, CRITERION, batches(1)[0], capture="on")
    assert backend_of("auto", CPU, reason_against(CPU, updates)) == (None, None)


def test_reasons_against_a_capture():
    gpu, (model, lars) = torch.device("cuda"), made()
    assert reason_against(gpu, lars) is None
    assert reason_against(gpu, lars, ranks=2).startswith("2 ranks sum their gradients")
    assert "other ranks" in reason_against(gpu, lars, placement="ranks")
    assert "graphs of its own" in reason_against(gpu, lars, graphs=True)
    parameters = list(model.parameters())
    assert "make it with fused=True" in reason_against(gpu, torch.optim.SGD(parameters, lr=0.1))
    assert "make it with capturable=True" in why_not(torch.optim.AdamW(parameters, lr=0.1))
    assert why_not(torch.optim.SGD(parameters, lr=0.1, fused=True)) is None
    assert why_not(cl.LAMB(parameters, lr=0.1)) is None
    assert why_not(torch.optim.LBFGS(parameters)).startswith("LBFGS is not known to take")
    line = backend_of("auto", gpu, "2 ranks")[1]
    assert line == "steps are not captured: 2 ranks"


def test_rates_follow_schedulers_and_hands_and_are_saved_as_numbers():
    _, updates = made()
    rates = rates_on(updates, CPU)
    bind(updates, rates)
    updates.param_groups[0]["lr"].fill_(0.5)  # as a scheduler does with a tensor
    take_over(updates, rates)
    assert float(rates[0]) == 0.5
    updates.param_groups[0]["lr"] = 0.25
    take_over(updates, rates)
    assert updates.param_groups[0]["lr"] is rates[0]
    assert float(rates[0]) == plain_state(updates)["param_groups"][0]["lr"] == 0.25
    assert updates.param_groups[0]["lr"] is rates[0]


def test_copies_stay_where_they_are_for_each_size():
    copies = Copies(CPU)
    places = []
    for number, (images, labels) in enumerate(batches(6)):
        indices = torch.arange(len(labels))
        batch = Batch(images, labels, indices, indices, 1.0)
        step = Step(number, 0, 9, lambda _, batch=batch: [batch], lambda _, batch=batch: [len(batch.labels)])
        (copied,) = copies.load(step, (0,)).batches()
        assert torch.equal(copied.images, images)
        places.append(copied.images.data_ptr())
    assert len(set(places)) == 2
    assert len(set(places[:4])) == 1
