"""What is sent between ranks of which some only attack; the ranks themselves are in tests/training."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conadv_lab.data.loader import Batch, Split, Stream
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.lanes import Streams
from conadv_lab.methods.placement import packed_state, unpack_state
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
    flat, updates = packed_state(model), adversarial_updates(model)
    with CountedReads() as reads:
        unpack_state(other, flat, updates)
        assert adversarial_updates(other) == 1
    assert reads.count == 0, "an attacker's host waits for its device"
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other[3].weight.is_contiguous(memory_format=torch.channels_last)


class CountedReads(TorchDispatchMode):
    """How often a value was read from a device, as `item` and `int` do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


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
    with pytest.raises(ValueError, match="3 ranks cannot each get an image of a micro-batch of 2"):
        Stream(image_set(50), seed=0, batch=32, steps=1, micro_batch=15, split=Split(0, 3, spread=True))


def test_streams_need_a_gpu():
    with pytest.raises(ValueError, match="placement is 'stream' on device 'cpu'; allowed: on cuda"):
        Streams(torch.device("cpu"))
