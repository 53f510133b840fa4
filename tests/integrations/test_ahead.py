"""The look-ahead of other trainers: the steps of `lookahead`, over a shuffled loader too, and after a resume."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import conadv_lab as cl
from conadv_lab.integrations.ahead import Ahead
from tests.conftest import small_cnn

ATTACK = cl.SignAttack(0.1)
METHODS = {
    "vanilla": cl.Vanilla,
    "conadv": lambda: cl.ConAdv(ATTACK, staleness=3),
    "recycled": lambda: cl.Recycled(0.1),
}


class Noisy(Dataset):
    """Images with noise of all three global generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        drawn = torch.rand(2, 6, 6) * 0.5 + float(np.random.rand()) * 0.25 + random.random() * 0.25  # noqa: NPY002
        return drawn, index % 4


def plain() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.rand(4, 2, 6, 6, generator=draw), torch.randint(0, 4, (4,), generator=draw)) for _ in range(5)
    ]


def trained(ahead: Ahead, model: nn.Module, optimizer, method, until: int, interfere: bool = False) -> None:
    criterion = nn.CrossEntropyLoss()
    while ahead.trained < until:
        for step in ahead:
            method.backward(model, step, criterion)
            optimizer.step()
            optimizer.zero_grad()
            ahead.done(step)
            if interfere:  # as dropout does in training
                torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
            if ahead.trained == until:
                break


def parts(name: str):
    model, method = cl.mixture_batch_norm(small_cnn()), METHODS[name]()
    return model, method, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_steps_are_those_of_lookahead(name, accumulate):
    """Where the loader's epoch has whole steps; the queue crosses its end."""
    loader = plain()[: 4 if accumulate == 2 else 5]
    model, method, optimizer = parts(name)
    trained(Ahead(loader, method, accumulate=accumulate), model, optimizer, method, until=7)
    twin, method, optimizer = parts(name)
    for step in cl.lookahead(loader, steps=7, ahead=method.lookahead, accumulate=accumulate):
        method.backward(twin, step, nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


LOADERS = {
    "unseeded": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(
        Noisy(), batch_size=4, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_shuffled_loader_goes_on_bitwise(name, kind, stop):
    torch.manual_seed(0)
    model, method, optimizer = parts(name)
    trained(Ahead(LOADERS[kind](), method), model, optimizer, method, until=9, interfere=True)

    torch.manual_seed(0)
    first, method, optimizer = parts(name)
    ahead = Ahead(LOADERS[kind](), method)
    trained(ahead, first, optimizer, method, until=stop)
    if stop == 7:
        next(iter(ahead))  # a trainer may read a step further than it trains
    state = ahead.state_dict()

    torch.manual_seed(99)
    again, method, optimizer = parts(name)
    again.load_state_dict(first.state_dict())
    ahead = Ahead(LOADERS[kind](), method)
    ahead.load_state_dict(state)
    trained(ahead, again, optimizer, method, until=9)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_random_state_of_training_is_left_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    for _ in Ahead(LOADERS["unseeded"](), cl.Vanilla()):
        pass
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected  # noqa: NPY002


def test_every_epoch_has_an_order_of_its_own_and_every_image_once():
    data = TensorDataset(torch.rand(8, 1), torch.arange(8))
    ahead = Ahead(DataLoader(data, batch_size=2, shuffle=True), METHODS["conadv"]())
    seen = [[int(y) for step in ahead for b in step.batches() for y in b.labels] for _ in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in seen)
    assert seen[0] != seen[1] != seen[2]


def test_images_that_do_not_come_back_are_told_of_and_attacked_anew():
    model, method, optimizer = parts("conadv")
    ahead = Ahead(plain(), method)
    trained(ahead, model, optimizer, method, until=2)
    state = ahead.state_dict()
    method = METHODS["conadv"]()
    ahead = Ahead([(images.flip(-1), labels) for images, labels in plain()], method)
    with pytest.warns(UserWarning, match="gives other images for step 2 than before the stop"):
        ahead.load_state_dict(state)
    assert not method.pending
    trained(ahead, model, optimizer, method, until=4)


def test_a_method_keeps_what_belongs_to_no_image():
    """LookSAM's gradient is kept when images differ, and nothing is said to be attacked again."""
    model, method = cl.mixture_batch_norm(small_cnn()), cl.LookSAM(0.05, every=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ahead = Ahead(plain(), method)
    trained(ahead, model, optimizer, method, until=2)
    state, again = ahead.state_dict(), cl.LookSAM(0.05, every=5)
    ahead = Ahead([(images.flip(-1), labels) for images, labels in plain()], again)
    with pytest.warns(UserWarning, match="than before the stop; images that depend"):
        ahead.load_state_dict(state)
    mine, theirs = (
        [tensor for part in one.state_dict()["shared"]["kept"] for tensors in part for tensor in tensors]
        for one in (again, method)
    )
    assert theirs
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_steps_that_nobody_reported_cannot_be_saved():
    ahead = Ahead(plain(), METHODS["recycled"]())
    steps = iter(ahead)
    for _ in range(2):
        next(steps)
    ahead.state_dict()
    next(steps)
    with pytest.raises(
        ValueError, match=r"3 steps were fetched and 0 are done; allowed: .* call done\(step\) after"
    ):
        ahead.state_dict()


def test_steps_end_where_they_are_told():
    ahead = Ahead(plain(), METHODS["conadv"](), steps=7)
    assert [len(list(ahead)) for _ in range(3)] == [5, 2, 0]


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (iter(plain()), {}, "has no length; allowed: a list or a DataLoader"),
        (plain(), {"accumulate": 6}, "the loader has 5 batches; allowed: at least 6"),
        (plain(), {"accumulate": 0}, "accumulate is 0; allowed: a whole number of at least 1"),
    ],
)
def test_mistakes(loader, options, message):
    with pytest.raises(ValueError, match=message):
        Ahead(loader, cl.Vanilla(), **options)
