"""Models and data in the shapes that other libraries give them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conadv_lab.sharpness import Hessian, Problem, measure
from tests.sharpness.conftest import mlp, ragged_batches, transformer


class Wrapped(nn.Module):
    """Takes named tensors and returns an object with logits, as language models do."""

    def __init__(self):
        super().__init__()
        self.inner = transformer()

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(loss=None, logits=self.inner(input_ids))


def test_named_inputs_and_an_object_with_logits():
    batches = ragged_batches("transformer")
    named = [({"input_ids": x, "attention_mask": torch.ones_like(x)}, y) for x, y in batches]
    plain = Problem(transformer(), nn.CrossEntropyLoss(), batches)
    wrapped = Problem(Wrapped(), nn.CrossEntropyLoss(), named)
    vector = torch.ones(plain.size)
    assert torch.equal(Hessian(plain) @ vector, Hessian(wrapped) @ vector)
    assert wrapped.examples == 21


def test_a_loader_a_list_a_pair_and_a_generator_are_the_same_data():
    x, y = (torch.cat(part) for part in zip(*ragged_batches("mlp", torch.float32), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    sources = [loader, (x, y), list(zip(x.split(5), y.split(5), strict=True)), (b for b in [(x, y)])]
    values = [
        measure(mlp(), nn.CrossEntropyLoss(), s, ("top_eigenvalue",))["top_eigenvalue"].value for s in sources
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


def test_the_loaders_own_shuffling_is_the_same_for_every_product():
    x, y = (torch.cat(part) for part in zip(*ragged_batches("mlp", torch.float32), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    problem = Problem(mlp(), nn.CrossEntropyLoss(), loader)
    vector = torch.ones(problem.size)
    each = Hessian(problem)._bytes_per_example(x, y)
    partly = Hessian(problem, memory_budget=int(18 * each))  # room for two of the three batches
    first = partly @ vector
    assert len(partly._kept) == 2
    assert torch.equal(first, partly @ vector)
    torch.testing.assert_close(first, Hessian(problem, memory_budget=0) @ vector)


def test_a_shuffling_loader_keeps_its_order_in_the_inputs_too():
    x, y = (torch.cat(part) for part in zip(*ragged_batches("mlp"), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    problem = Problem(mlp().double(), nn.CrossEntropyLoss(), loader)
    each = Hessian(problem, wrt="inputs")._bytes_per_example(x, y)
    kept, partly = (Hessian(problem, wrt="inputs", memory_budget=b) for b in (2**30, int(18 * each)))
    vector = torch.randn(kept.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept @ vector, partly @ vector)


def test_a_batch_may_be_one_mapping_with_labels():
    batches = ragged_batches("transformer")
    plain = Problem(transformer(), nn.CrossEntropyLoss(), batches)
    for name in ("labels", "label"):
        mapped = [{"input_ids": x, "attention_mask": torch.ones_like(x), name: y} for x, y in batches]
        found = Problem(Wrapped(), nn.CrossEntropyLoss(), mapped)
        assert found.examples == 21
        assert found.value() == plain.value()
    alone = Problem(Wrapped(), nn.CrossEntropyLoss(), {"input_ids": batches[0][0], "labels": batches[0][1]})
    assert alone.batch_sizes == (8,)


class Positions(nn.Module):
    """A class at each position, the classes on the last axis, in a mapping as segmentation models give it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids):
        return {"out": self.head(self.embed(input_ids)), "aux": None}


def test_a_criterion_of_ones_own_may_have_its_classes_on_another_axis():
    def next_token(output, targets):
        return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    tokens = torch.arange(24).remainder(7).view(6, 4)  # labels up to 6 beside an axis 1 of length 4
    report = measure(Positions(), next_token, [{"input_ids": tokens, "labels": tokens}], ("top_eigenvalue",))
    assert report["top_eigenvalue"].value > 0
    with pytest.raises(ValueError, match=r"criterion fails on batch 0 \(outputs float32 .*\): Target"):
        Problem(Positions(), next_token, [{"input_ids": tokens, "labels": tokens + 3}])


STRANGE = {
    "keys": ([{"x": torch.ones(2)}], "has the keys x; one must be called 'labels'"),
    "three": ([(torch.ones(2), torch.ones(2), torch.ones(2))], "a batch is tuple of 3"),
    "tensor": ([torch.ones(2)], "a batch is Tensor"),
}


@pytest.mark.parametrize("name", sorted(STRANGE))
def test_a_batch_that_is_no_pair_is_told(name):
    batches, told = STRANGE[name]
    with pytest.raises(ValueError, match=told):
        Problem(mlp(), nn.CrossEntropyLoss(), batches)
