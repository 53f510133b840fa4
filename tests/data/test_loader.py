"""The stream of steps, and the same over somebody else's loader."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import conadv_lab as cl
from conadv_lab.data.loader import Stream
from conadv_lab.data.lookahead import lookahead
from conadv_lab.data.order import places
from tests.conftest import image_set, small_cnn


def drawn(batches) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b.epochs.tolist(), b.indices.tolist(), strict=True)]


def test_every_epoch_is_a_permutation_and_epochs_follow_without_a_gap():
    epochs, indices = places(seed=3, count=10, start=0, stop=35)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    orders = [indices[i : i + 10].tolist() for i in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_the_stream_does_not_depend_on_micro_batches_or_on_who_asks(micro_batch):
    whole = Stream(image_set(10), seed=0, batch=7, steps=5)
    parts = Stream(image_set(10), seed=0, batch=7, steps=5, micro_batch=micro_batch)
    for number in (4, 0, 2):
        assert drawn(whole.step(number).batches()) == drawn(parts.step(number).batches())
        assert sum(b.share for b in parts.step(number).batches()) == pytest.approx(1)
        assert whole.step(number).size() == parts.step(number).size() == 7
    assert drawn(whole.step(2, ahead=2).batches(2)) == drawn(whole.step(4).batches())
    assert drawn(whole.step(2).batches(-1)) == drawn(whole.step(1).batches())


def test_a_longer_first_step_begins_with_an_ordinary_ones_groups():
    stream = Stream(image_set(40), seed=0, batch=6, first_batch=12, micro_batch=4, steps=4)
    sizes = [[len(b.labels) for b in stream.step(n).batches()] for n in (0, 1, 2)]
    assert sizes == [[4, 2, 4, 2], [4, 2], [4, 2]]
    assert [stream.first_place(n) for n in range(4)] == [0, 12, 18, 24]
    assert [stream.step(1, ahead=1).size(offset) for offset in (-1, 0, 1)] == [12, 6, 6]
    seen = [pair for n in range(4) for pair in drawn(stream.step(n).batches())]
    assert len(set(seen)) == 30


@pytest.mark.parametrize(("offset", "message"), [(2, "offset is 2"), (-2, "offset is -2")])
def test_a_step_cannot_be_asked_for_what_it_does_not_see(offset, message):
    stream = Stream(image_set(10), seed=0, batch=2, steps=5)
    with pytest.raises(ValueError, match=message):
        stream.step(2, ahead=1).batches(offset)
    with pytest.raises(ValueError, match=message):
        stream.step(2, ahead=1).size(offset)


def loader(count: int = 3):
    data = image_set(12 * count)
    return [(data.images[i::count].float() / 255, data.labels[i::count]) for i in range(count)]


def test_lookahead_crosses_epochs_and_ends_where_it_should():
    batches = loader(3)
    steps = list(lookahead(batches, steps=7, ahead=2))
    for number, step in enumerate(steps):
        assert (step.number, step.last) == (number, 6)
        for offset in range(-1, 3):
            if 0 <= number + offset <= 6:
                (batch,) = step.batches(offset)
                assert batch.images is batches[(number + offset) % 3][0]
                assert step.size(offset) == len(batch.images)
                assert batch.epochs[0] == (number + offset) // 3
        with pytest.raises(ValueError, match="the steps of this stream"):
            steps[-1].batches(1)


def test_accumulated_batches_give_the_step_of_one_large_batch():
    """In float64 and without batch norm, whose ghost groups are the micro-batches."""

    def trained(batches, accumulate):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 10)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = cl.ConAdv(cl.SignAttack(0.1), staleness=2)
        for step in cl.lookahead(batches, 6, ahead=method.lookahead, accumulate=accumulate):
            method.backward(model, step, torch.nn.CrossEntropyLoss())
            optimizer.step()
            optimizer.zero_grad()
        return model[1].weight.detach()

    images, labels = (torch.cat(parts)[:36] for parts in zip(*loader(3), strict=True))
    images = images.double()
    cut = [13, 5, 15, 3]  # unequal: each counts by its images
    small = list(zip(images.split(cut), labels.split(cut), strict=True))
    large = list(zip(images.split(18), labels.split(18), strict=True))
    torch.testing.assert_close(trained(small, 2), trained(large, 1), rtol=1e-12, atol=1e-12)


def test_batches_go_to_the_device_of_the_model():
    (step,) = lookahead(loader(1), steps=1, device="meta")
    (batch,) = step.batches()
    assert {t.device.type for t in (batch.images, batch.labels, batch.epochs, batch.indices)} == {"meta"}


class Counting:
    """A loader that knows how many batches it gave."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        for batch in loader(3):
            self.given += 1
            yield batch


def test_lookahead_reads_no_batch_that_will_not_be_used():
    counting = Counting()
    for step in lookahead(counting, steps=5, ahead=3):
        assert counting.given == min(step.number + 4, 5)
    assert counting.given == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lookahead([], steps=2),
            "the loader yielded no batch; allowed: a list or a DataLoader of batches",
        ),
        (lambda: lookahead(loader(), steps=-1), "steps is -1"),
        (lambda: lookahead(loader(), steps=2, ahead=-1), "ahead is -1"),
        (lambda: lookahead(loader(), steps=2, accumulate=0), "accumulate is 0"),
        (lambda: lookahead([(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2))], 1), "uint8"),
    ],
)
def test_impossible_streams_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        list(make())


@pytest.mark.parametrize(
    "method",
    [
        lambda: cl.Vanilla(),
        lambda: cl.DisAdv(cl.SignAttack(0.05)),
        lambda: cl.ConAdv(cl.SignAttack(0.05), staleness=2),
        lambda: cl.Recycled(0.05),
        lambda: cl.Recycled(0.05, equal_cost=True),
        lambda: cl.Noise(0.05),
        lambda: cl.Copy(),
    ],
)
def test_the_methods_serve_somebody_elses_loop(method):
    method = method()
    model = cl.mixture_batch_norm(small_cnn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in cl.lookahead(loader(), steps=40, ahead=method.lookahead):
        losses.append(method.backward(model, step, nn.CrossEntropyLoss()).clean.item())
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_loop_that_cannot_work_is_told_why():
    method = cl.ConAdv(cl.SignAttack(0.05), staleness=2)
    step = next(iter(cl.lookahead(loader(), steps=4, ahead=1)))
    with pytest.raises(ValueError, match=r"look 1 ahead; ConAdv needs lookahead\(…, ahead=2\)"):
        method.backward(cl.mixture_batch_norm(small_cnn()), step, nn.CrossEntropyLoss())
    step = next(iter(cl.lookahead(loader(), steps=4, ahead=2)))
    with pytest.raises(ValueError, match="convert it first"):
        method.backward(small_cnn(), step, nn.CrossEntropyLoss())


@pytest.mark.parametrize("make", [lambda: cl.Recycled(0.05), lambda: cl.ConAdv(cl.SignAttack(0.05), 2)])
def test_a_method_forgets_an_earlier_loop(make):
    """A loop that is left early, or one loop an epoch: the next begins as with a new object."""
    states = []
    for warm in (False, True):
        method, model = make(), cl.mixture_batch_norm(small_cnn())
        if warm:
            other = cl.mixture_batch_norm(small_cnn(seed=1))
            for step in cl.lookahead(loader(2), steps=4, ahead=method.lookahead):
                method.backward(other, step, nn.CrossEntropyLoss())
                if step.number == 1:
                    break
        for step in cl.lookahead(loader(), steps=3, ahead=method.lookahead):
            method.backward(model, step, nn.CrossEntropyLoss())
        states.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_a_loader_that_can_be_read_only_once_is_told_so():
    with pytest.raises(
        ValueError, match=r"no batch when it was restarted; allowed: .* which can be iterated over repeatedly"
    ):
        list(lookahead(iter(loader(3)), steps=7))


X, Y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, torch.arange(4)),
        [X, Y],
        {"pixel_values": X, "labels": Y, "attention_mask": torch.ones(4)},
        {"image": X.numpy(), "label": Y.numpy()},
        (X.double().numpy(), Y.int().numpy()),
        (X.numpy(), Y.tolist()),
        (X, Y.int()),
    ],
    ids=["triple", "list", "mapping", "mapping of arrays", "arrays", "labels in a list", "int32 labels"],
)
def test_batches_of_every_usual_form_are_images_and_labels(batch):
    (got,) = next(lookahead([batch], steps=1)).batches()
    assert torch.equal(got.images, X)
    assert torch.equal(got.labels, Y)
    assert (got.images.dtype, got.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (TensorDataset(X, Y), r"single images \(this one with label 0\), as a Dataset does; allowed: .*DataLoader"),
        ([(X[0], 3)], r"single images \(this one with label 3\)"),
        ((X, Y), r"a batch is of type Tensor; allowed: \(images, labels\), or a mapping"),
        ([(X,)], "a batch is of type tuple and length 1; allowed"),
        ([{"features": X, "labels": Y}], "the keys features, labels; allowed: one of images, image, .* for the images"),
        ([{"x": X, "label": Y, "target": Y}], "the keys x, label, target; allowed: one of labels, .* for the labels"),
        ([(X, Y[:3])], "4 images and 3 labels; allowed: one label per image"),
        ([([X, X], Y)], "the images of a batch are of type list; allowed: a tensor or a NumPy array"),
        ([(X, ["cat"] * 4)], "the labels of a batch are of type list"),
        (7, "the loader is of type int; allowed: a list or a DataLoader"),
    ],
)  # fmt: skip
def test_what_is_no_loader_of_batches_is_told_so(batches, message):
    with pytest.raises(ValueError, match=message):
        next(lookahead(batches, steps=1))
