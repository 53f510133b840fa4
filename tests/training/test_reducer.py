"""Buckets are sent while the backward goes on, in one order, and a wrong announcement is found."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conadv_lab.methods.base import Losses
from conadv_lab.models.norm import branch_of, mixture_batch_norm
from conadv_lab.training.reducer import Reducer
from tests.conftest import small_cnn


@pytest.fixture
def group():
    """A world of one rank in this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def backward(model: nn.Module, branch: str = "main") -> Losses:
    with branch_of(model, branch):
        loss = model(torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))).square().mean()
    loss.backward()
    return Losses(loss.detach())


def test_buckets_leave_during_the_last_backward_the_last_layers_first(group, monkeypatch):
    model = mixture_batch_norm(small_cnn())
    reducer = Reducer(model, group, bucket_bytes=1)
    events: list[object] = []
    original = dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda x, **more: (events.append(x.numel()), original(x, **more))[1]
    )
    model[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    reducer.begin(2)
    backward(model)
    assert events == ["first layer"]
    losses = backward(model, "adversarial")
    linear, second, first = model[7], model[3], model[0]
    sizes = [p.numel() for layer in (linear, second, first) for p in (layer.bias, layer.weight)]
    assert [event for event in events if event != "first layer"] == sizes
    # The second layer's gradient is under way before the first one's is made.
    assert events.index(second.weight.numel()) < events.index("first layer", 1)
    before = [p.grad.clone() for p in model.parameters()]
    reducer.finish(losses, check=True)
    branches = [p.numel() for i in (1, 4) for p in model[i].parameters()]
    assert events[-len(branches) - 1 : -1] == branches
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_nothing_leaves_early_where_the_passes_are_not_known(group, monkeypatch):
    model = mixture_batch_norm(small_cnn())
    reducer = Reducer(model, group, bucket_bytes=1)
    reducer.begin(0)
    monkeypatch.setattr(reducer, "_send_next", lambda: pytest.fail("sent before the end"))
    backward(model)


def test_more_backwards_than_announced_are_an_error(group):
    model = mixture_batch_norm(small_cnn())
    reducer = Reducer(model, group)
    reducer.begin(1)
    backward(model)
    with pytest.raises(RuntimeError, match="announced 1 backward passes but ran more"):
        backward(model)


def test_unused_weights_keep_no_gradient(group):
    """As with one rank: an optimiser must not decay what was not trained."""
    model = mixture_batch_norm(small_cnn())
    reducer = Reducer(model, group)
    reducer.begin(1)
    reducer.finish(backward(model), check=True)
    assert {name for name, p in model.named_parameters() if p.grad is None} == {
        f"{i}.adversarial.{kind}" for i in (1, 4) for kind in ("weight", "bias")
    }


def test_gradients_are_copied_as_they_lie_in_memory(group):
    """torch copies lists of tensors in one go only where both sides have the same strides."""
    model = mixture_batch_norm(small_cnn()).to(memory_format=torch.channels_last)
    reducer = Reducer(model, group)
    for bucket in reducer.buckets:
        pairs = zip(bucket.views, bucket.parameters, strict=True)
        assert all(view.stride() == parameter.stride() for view, parameter in pairs)
    reducer.begin(1)
    losses = backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    reducer.finish(losses, check=True)
    assert all(torch.equal(model.get_parameter(name).grad, kept) for name, kept in before.items())
