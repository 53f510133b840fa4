"""Placements: what is sent between ranks, and that a side stream changes nothing; ranks are in tests/training."""

import copy

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Batch, Split, Stream
from conadv_lab.methods.adversarial import ConAdv
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.placement import SideStream, packed_state, unpack_state
from conadv_lab.models.norm import adversarial_updates, branch_of, mixture_batch_norm, one_update
from tests.conftest import image_set, small_cnn

CRITERION = nn.CrossEntropyLoss()


def test_a_packed_state_is_the_same_model_elsewhere():
    """Weights, statistics and the count of updates, of several dtypes and memory layouts."""
    model = mixture_batch_norm(small_cnn()).to(memory_format=torch.channels_last)
    model[0].half()
    other = copy.deepcopy(model)
    assert adversarial_updates(other) == 0
    with one_update(model[1]), branch_of(model[1], "adversarial"):
        model[1](torch.rand(4, 6, 3, 3))
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    unpack_state(other, packed_state(model))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert adversarial_updates(other) == 1


@pytest.mark.parametrize(
    "attack",
    [SignAttack(0.1), PGDAttack(0.1, steps=2), PGDAttack(0.5, steps=2, norm="l2")],
    ids=["sign", "linf", "l2"],
)
def test_there_is_room_for_what_an_attack_keeps(attack):
    model = mixture_batch_norm(small_cnn())
    images = torch.rand(3, 2, 6, 6)
    batch = Batch(images, torch.zeros(3).long(), torch.zeros(3).long(), torch.arange(3), 1.0)
    kept, room = attack.perturb(model, batch, CRITERION), attack.space(images.shape, images.dtype)
    assert (room.shape, room.dtype, room.device.type) == (kept.shape, kept.dtype, "cpu")


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("batch", "first", "micro_batch"), [(32, 32, 8), (32, 32, 7), (16, 32, 5), (9, 9, 3)]
)
def test_every_image_of_a_step_is_exactly_one_rank_s(batch, first, micro_batch, spread):
    whole = Stream(image_set(50), seed=0, batch=batch, first_batch=first, steps=5, micro_batch=micro_batch)
    for ranks in (1, 2, 3):
        if spread and min(last - start for start, last in whole.groups(1)) < ranks:
            continue
        splits = [Split(rank, ranks, spread) for rank in range(ranks)]
        parts = [
            Stream(
                image_set(50),
                seed=0,
                batch=batch,
                first_batch=first,
                steps=5,
                micro_batch=micro_batch,
                split=split,
            )
            for split in splits
        ]
        for number in (0, 1, 2):
            everything = torch.cat([b.indices for b in whole.step(number).batches()]).tolist()
            shared = [b for part in parts for b in part.step(number).batches()]
            assert sorted(torch.cat([b.indices for b in shared]).tolist()) == sorted(everything)
            assert sum(b.share for b in shared) == pytest.approx(1)
            assert [part.step(number).size() for part in parts] == [
                sum(len(b.labels) for b in part.step(number).batches()) for part in parts
            ]
            assert [len(part.own_spans(number)) for part in parts] == [
                len(list(part.step(number).batches())) for part in parts
            ]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(
        ValueError, match=r"3 ranks cannot share a step of 2 micro-batches.*micro_batch of at most 10"
    ):
        Stream(image_set(50), seed=0, batch=32, steps=1, micro_batch=16, split=Split(0, 3))
    with pytest.raises(ValueError, match="3 ranks cannot each have an image of a micro-batch of 2"):
        Stream(image_set(50), seed=0, batch=32, steps=1, micro_batch=15, split=Split(0, 3, spread=True))


def test_a_side_stream_needs_a_gpu():
    with pytest.raises(ValueError, match="placement is 'stream' on device 'cpu'; allowed: on cuda"):
        SideStream(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("attack", [SignAttack(0.1), PGDAttack(0.1, 0.05, steps=3)], ids=["sign", "pgd"])
def test_a_side_stream_changes_nothing(attack):
    """To rounding, as the GPU may choose other algorithms in a graph; 20 steps pass the warm-up of the statistics."""
    device = torch.device("cuda")
    images = image_set(50)
    images.images, images.labels = images.images.to(device), images.labels.to(device)
    finals = []
    for placement in (None, SideStream(device)):
        model = mixture_batch_norm(small_cnn()).to(device)
        method = ConAdv(copy.deepcopy(attack), staleness=2, placement=placement)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        steps = Stream(images, seed=5, batch=16, steps=20, micro_batch=8)
        for number in range(20):
            method.backward(model, steps.step(number, method.lookahead), CRITERION)
            optimizer.step()
            optimizer.zero_grad()
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        assert torch.allclose(value.double(), finals[1][name].double(), rtol=0, atol=1e-5), name
