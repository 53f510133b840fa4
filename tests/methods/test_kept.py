"""What a step leaves in memory does not come in as many pieces as it has micro-batches."""

import weakref

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.methods.kept import Slots
from conadv_lab.methods.steps import check_mean, total, totals
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


def test_slots_stay_where_they_are_and_move_up():
    slots = Slots(3)
    slots.reserve(7)
    given = torch.rand(7, 3, 2).split([4, 2, 1])
    slots.adopt(2, given)
    places = [rows.data_ptr() for rows in slots.rows]
    slots.move_up()
    slots.move_up()
    parts = slots.parts(0, [4, 2, 1])
    assert all(torch.equal(one, other) for one, other in zip(parts, given, strict=True))
    assert slots.adopt(0, parts)[0].data_ptr() == places[0]  # what lies there is not copied
    slots.reserve(5)
    assert [rows.data_ptr() for rows in slots.rows] == places
    slots.reserve(9)
    parts = slots.parts(0, [4, 2, 1])
    assert all(torch.equal(one, other) for one, other in zip(parts, given, strict=True))


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


@pytest.mark.parametrize("equal_cost", [False, True])
def test_recycled_moves_no_images_by_other_images_signs(equal_cost):
    """A step that was left out or that failed: the next one has no gradients of the images before it."""
    method, model = Recycled(0.1, equal_cost), mixture_batch_norm(small_cnn())
    steps = Stream(image_set(50), seed=0, batch=8, first_batch=16, micro_batch=4, steps=6)
    adversarial = []
    for number in (0, 1, 3, 4):
        announced = method.passes(steps.step(number))
        losses = method.backward(model, steps.step(number), nn.CrossEntropyLoss())
        adversarial.append(losses.adversarial is not None)
        assert announced == (2 if losses.adversarial is not None and not equal_cost else 1)
    assert adversarial == [False, True, False, True]
    method.load_state_dict(method.state_dict())
    assert method.backward(model, steps.step(5), nn.CrossEntropyLoss()).adversarial is not None


def test_a_step_that_failed_can_be_taken_again_with_its_own_attack():
    method, model = ConAdv(SignAttack(0.1), staleness=1), mixture_batch_norm(small_cnn())
    steps = Stream(image_set(50), seed=0, batch=8, micro_batch=4, steps=6)
    method.backward(model, steps.step(0, 1), nn.CrossEntropyLoss())
    before = [part.clone() for part in method.pending[1]]

    def failing(outputs, labels):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        method.backward(model, steps.step(1, 1), failing)
    assert all(torch.equal(one, two) for one, two in zip(method.pending[1], before, strict=True))
    method.backward(model, steps.step(3, 1), nn.CrossEntropyLoss())  # and those left out are forgotten
    assert set(method.pending) == {4}


def test_a_mean_in_bfloat16_is_a_mean():
    for seed in range(20):
        torch.manual_seed(seed)
        outputs, labels = torch.randn(16, 10).bfloat16(), torch.randint(0, 10, (16,))
        check_mean(nn.CrossEntropyLoss(), outputs, labels)
        with pytest.raises(ValueError, match="not a sum"):
            check_mean(nn.CrossEntropyLoss(reduction="sum"), outputs, labels)
