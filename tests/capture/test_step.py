"""The captured step of other people's loops, and what is said where a step cannot be captured."""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab.capture.choice import backend_of, hooked, reason_against, slower, synchronised
from conadv_lab.capture.feed import Copies
from conadv_lab.capture.replays import CannotCapture, CudaGraphs
from conadv_lab.capture.step import CapturedStep
from conadv_lab.data.loader import Batch, Step
from conadv_lab.methods.families.robust import FreeAT
from conadv_lab.models.norm import share_statistics
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


def recorded_and_plain(
    taken: Callable[[CapturedStep, nn.Module, Any], None], *, fused: bool = False, method: Callable = method
) -> None:
    """What is done with a captured step does to the weights what it does to one that runs as it is."""
    models = []
    for backend in (Recordings(), None):
        model = cl.mixture_batch_norm(small_net())
        parameters = list(model.parameters())
        updates: Any = (
            torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True)
            if fused
            else cl.LARS(parameters, 0.5)
        )
        step = CapturedStep(model, method(), updates, CRITERION, batches(1)[0])
        if backend is not None:
            step._begin(model, step.method, updates, CRITERION, CPU, backend, required=True)
        taken(step, model, updates)
        assert backend is None or backend.replayed > 0
        models.append(model)
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in models), strict=True))


def small_net() -> nn.Module:
    """Of images of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
        )  # fmt: skip


def of_size(images: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.interpolate(images, (size, size))


def test_images_of_another_size_are_another_kind():
    def taken(step, _model, _updates):
        for number, (images, labels) in enumerate(batches(36)):
            step(of_size(images, 6 if number // 12 != 1 else 8), labels)

    recorded_and_plain(taken)


def test_a_setting_that_changes_is_seen():
    """A momentum that is changed, a norm in eval mode, weights that are frozen, an optimizer's state that is loaded."""

    def taken(step, model, updates):
        loader = iter(batches(45))
        for change in (
            lambda: None,
            lambda: updates.param_groups[0].update(momentum=0.5),
            lambda: model[1].eval(),
            lambda: model[0].weight.requires_grad_(False),
            lambda: updates.load_state_dict(updates.state_dict()),
        ):
            change()
            for _ in range(9):
                step(*next(loader))

    recorded_and_plain(taken)


def test_the_noise_of_freeat_is_that_of_the_last_step_and_may_be_loaded():
    """After a shorter batch and the replay of a longer one, and while graphs read it."""

    def taken(step, _model, _updates):
        for number, batch in enumerate(batches(28)):
            if number == 24:
                noise = [part.clone() for part in step.method.state_dict()["pending"]]
                assert [len(part) for part in noise] == [8]
                step.method.load_state_dict({"pending": [-part for part in noise]})
            step(*batch)

    recorded_and_plain(taken, method=lambda: FreeAT(0.1, replays=1))


def test_a_parameter_group_may_be_added():
    def taken(step, model, updates):
        group = updates.param_groups[0]
        left = group["params"][-1:]
        group["params"] = group["params"][:-1]
        for batch in batches(10):
            step(*batch)
        updates.add_param_group({"params": left, "lr": 0.25})
        for batch in batches(10):
            step(*batch)

    recorded_and_plain(taken)


def test_fused_sgd_may_begin_a_momentum_later():
    """Here the adversarial branch has no gradient in the first step."""
    for later in (cl.Recycled(0.1), cl.ConAdv(cl.SignAttack(epsilon=0.1), first="clean")):
        model, _ = made()
        updates = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        step = CapturedStep(model, later, updates, CRITERION, batches(1)[0])
        losses = [step(*batch) for batch in batches(4)]
        assert losses[-1].adversarial is not None


def test_after_the_rest_a_call_begins_to_look_ahead_anew():
    """Each batch is trained on once, in each of two epochs."""
    seen: list[torch.Tensor] = []

    def criterion(outputs, labels):
        seen.append(labels)
        return CRITERION(outputs, labels)

    model, updates = made()
    step = CapturedStep(model, cl.ConAdv(cl.SignAttack(epsilon=0.1), 2), updates, criterion, batches(1)[0])
    trained = []
    for _ in range(2):
        trained += [loss for batch in batches(5) if (loss := step(*batch)) is not None]
        trained += [*step.rest(), *step.rest()]
    assert len(trained) == step.taken == step.calls == 10


def test_a_loop_may_fill_one_tensor_for_all_batches():
    def weights(one_tensor: bool) -> list[torch.Tensor]:
        model, updates = made()
        step = CapturedStep(model, method(), updates, CRITERION, batches(1)[0])
        room = torch.empty(8, 2, 6, 6)
        for images, labels in batches(4):
            step(room.copy_(images) if one_tensor else images, labels)
        return list(model.parameters())

    assert all(torch.equal(one, other) for one, other in zip(weights(True), weights(False), strict=True))


def test_images_out_of_range_and_an_unknown_choice_are_refused():
    model, updates = made()
    images, labels = batches(1)[0]
    step = CapturedStep(model, method(), updates, CRITERION, (images, labels))
    with pytest.raises(ValueError, match=r"images lie in \[.*\]; allowed: \[0, 1\]"):
        [step(images * 2 - 3, labels) for _ in range(1 + method().lookahead)]
    with pytest.raises(
        ValueError, match=r"unknown capture 'onn'; allowed: auto, off, on\. Did you mean 'on'"
    ):
        CapturedStep(model, method(), updates, CRITERION, (images, labels), capture="onn")


@pytest.mark.parametrize(
    "error", [RuntimeError("the first\nand more"), RuntimeError(), torch.OutOfMemoryError("x")]
)
def test_a_capture_that_fails_leaves_the_stream_and_holds_no_memory(monkeypatch, error):
    """torch leaves the capture's stream the current one where a capture cannot be ended."""
    streams = ["the current one"]

    @contextmanager
    def stream(one):
        streams.append(one)
        try:
            yield
        finally:
            streams.pop()

    class Graph:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device, device_index=0))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    ended = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_, name=name: ended.append(name), raising=False)
    made: list[Any] = []
    cached: list[bool] = []

    def part():
        large = torch.zeros(3)
        made.append(ref(large))
        cached.append(torch.is_autocast_cache_enabled())
        raise error

    reasons = []
    gc.disable()
    try:
        try:
            CudaGraphs(CPU).capture(part)
        except CannotCapture as reason:
            reasons.append(str(reason))
        error.__traceback__ = None  # of the test's own
        assert made[0]() is None
    finally:
        gc.enable()
    assert streams == ["the current one"]
    assert ended == ["_cuda_endAllocateToPool", "_cuda_releasePool"]
    assert (cached, torch.is_autocast_cache_enabled()) == ([False], True)
    assert reasons[0] in ("the first", "RuntimeError", "there is not enough GPU memory for a captured step")


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
    assert "other ranks" in reason_against(gpu, lars, placement="ranks")
    assert "already captures the network in graphs" in reason_against(gpu, lars, graphs=True)
    parameters = list(model.parameters())
    assert "create it with fused=True" in reason_against(gpu, torch.optim.SGD(parameters, lr=0.1))
    assert "create it with capturable=True" in why_not(torch.optim.AdamW(parameters, lr=0.1))
    assert why_not(torch.optim.SGD(parameters, lr=0.1, fused=True)) is None
    assert why_not(cl.LAMB(parameters, lr=0.1)) is None
    assert why_not(torch.optim.LBFGS(parameters)).startswith("LBFGS may not support")
    assert synchronised(model) is None
    assert synchronised(nn.Sequential(nn.SyncBatchNorm(2))) == synchronised(of_slices())
    assert synchronised(of_slices()) == "batch norm is synchronised over ranks within each pass"
    few, many = (SimpleNamespace(steps=9, own_spans=lambda _, n=n: [(0, 1)] * n) for n in (8, 9))
    assert slower(few) is None
    assert slower(many) == "a step has 9 micro-batches; capturing is faster for at most 8"
    assert hooked(model) is None
    model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    assert hooked(model).startswith("0.weight has a hook on its gradient")
    line = backend_of("auto", gpu, "of a reason")[1]
    assert line == "steps are not captured: of a reason"


def of_slices() -> nn.Module:
    """A model of which each rank has a slice of every ghost batch."""
    model, _ = made()
    share_statistics(model, group=None, spread=True)
    return model


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


def test_a_learning_rate_beyond_float32_becomes_infinite_and_raises_nothing():
    from conadv_lab.capture.feed import Block

    block = Block(1, 2, torch.device("cpu"))
    block.send([1e200, 0.1])
    assert [float(rate) for rate in block.rates] == [float("inf"), pytest.approx(0.1)]
