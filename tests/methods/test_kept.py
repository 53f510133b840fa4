"""What a step leaves in memory does not come in as many pieces as it has micro-batches."""

import weakref

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.adversarial import ConAdv, Recycled
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.base import total, totals
from conadv_lab.methods.kept import Kept
from conadv_lab.models.norm import mixture_batch_norm
from tests.conftest import image_set, small_cnn


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        (ConAdv(SignAttack(0.1), staleness=2), 2),  # those of two steps to come
        (ConAdv(PGDAttack(0.1, steps=2)), 1),
        (Recycled(0.1), 1),
        (Recycled(0.1, equal_cost=True), 1),
    ],
    ids=["two ahead", "pgd", "recycled", "recycled-equal"],
)
def test_pending_perturbations_of_a_step_are_one_tensor(method, tensors):
    model = mixture_batch_norm(small_cnn())
    steps = Stream(image_set(50), seed=0, batch=15, first_batch=30, micro_batch=4, steps=5)
    for number in (0, 1):
        method.backward(model, steps.step(number, method.lookahead), nn.CrossEntropyLoss())
        pending = method.pending
        lists = list(pending.values()) if isinstance(pending, dict) else [pending]
        assert len({part.untyped_storage().data_ptr() for parts in lists for part in parts}) == tensors
        sizes = [4, 4, 4, 3] * (2 if number == 0 and isinstance(method, Recycled) else 1)
        assert all([len(part) for part in parts] == sizes for parts in lists)


def test_parts_come_back_as_they_were_given():
    given = torch.rand(7, 3, 2).split([4, 2, 1])
    kept = Kept(7)
    for part in given:
        kept.add(part)
    assert all(torch.equal(one, other) for one, other in zip(kept.parts(), given, strict=True))
    assert Kept(0).parts() == []


def test_losses_are_added_up_one_at_a_time():
    made: list[weakref.ref] = []

    def losses(count: int):
        for number in range(count):
            loss = torch.tensor(float(number))
            made.append(weakref.ref(loss))
            yield loss
            del loss
            assert number < 2 or made[number - 2]() is None

    assert total(losses(5)) == 10
    assert total(losses(1)) == 0
    sums = totals(zip(losses(4), losses(3), strict=False))
    assert (sums.clean, sums.adversarial) == (3, 3)
