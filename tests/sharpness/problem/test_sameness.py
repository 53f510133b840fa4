"""Data that changes between passes is refused, and nothing of the caller's is written into."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from tests.sharpness.oracle import difference_hessian
from tests.sharpness.zoo import real

X, Y = real(24, 4), torch.arange(24) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.left = list(zip(X, Y, strict=True))

    def __iter__(self):
        while self.left:
            yield self.left.pop()


class Shorter:
    """Loses a batch with every pass."""

    def __init__(self) -> None:
        self.batches = list(zip(X.split(6), Y.split(6), strict=True))

    def __iter__(self):
        yield from self.batches
        self.batches.pop()


class Longer(Shorter):
    def __iter__(self):
        yield from self.batches
        self.batches.append(self.batches[0])


class Augmented(Dataset):
    """Draws new noise for each image, from a generator of its own or from the operating system's."""

    def __init__(self, known: bool) -> None:
        self.generator = np.random.default_rng(0) if known else None

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int):
        generator = self.generator or np.random.default_rng()
        return X[index] + torch.from_numpy(generator.normal(size=4)), Y[index]


CHANGING = {
    "a stream that can be read once": (lambda: DataLoader(Once(), batch_size=6), "had 0 batches, the first one 4"),
    "a shorter second pass": (Shorter, "had 3 batches, the first one 4"),
    "a longer second pass": (Longer, "batch 4 did not exist in the first pass"),
    "new augmentations": (lambda: DataLoader(Augmented(False), batch_size=6), "batch 0 differs from"),
    "workers that go on": (
        lambda: DataLoader(Augmented(True), batch_size=6, num_workers=1, persistent_workers=True), "batch 0 differs"
    ),
    "labels": (lambda: Relabelled(), "batch 1 differs from"),
}  # fmt: skip


class Relabelled:
    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        for index, (x, y) in enumerate(zip(X.split(6), Y.split(6), strict=True)):
            yield x, (y + self.passes) % 3 if index == 1 else y


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("what", ["sam_worst", "top_eigenvalue"])
def test_data_that_changes_is_refused_with_what_to_do(name, what):
    make, told = CHANGING[name]
    with pytest.raises(ValueError, match=f"{told}.*list"):
        measure(network(), nn.CrossEntropyLoss(), make(), (what,))


def test_the_way_out_works():
    batches = list(DataLoader(Augmented(False), batch_size=6))
    problem = Problem(network(), nn.CrossEntropyLoss(), batches)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    truth = difference_hessian(network(), nn.CrossEntropyLoss(), x, y)
    torch.testing.assert_close(Hessian(problem).dense(), truth, rtol=0, atol=1e-8)


def deep() -> DataLoader:
    data = TensorDataset(X, Y)
    sampler = BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(5)), 7, False)
    return DataLoader(data, batch_sampler=sampler)


@pytest.mark.parametrize("make", [deep, lambda: DataLoader(Augmented(True), batch_size=6)])
def test_generators_that_lie_deeper_are_set_back(make):
    loader = make()
    problem = Problem(network(), nn.CrossEntropyLoss(), loader)
    v = torch.ones(problem.size, dtype=torch.float64)
    kept, streamed = Hessian(problem), Hessian(problem, memory_budget=0)
    each = kept._bytes_per_example(X, Y)
    partly = Hessian(problem, memory_budget=int(15 * each))
    for operator in (kept, streamed, partly):
        torch.testing.assert_close(operator @ v, kept @ v, rtol=1e-12, atol=1e-12)
    assert torch.equal(next(iter(loader))[0], next(iter(make()))[0])


def test_missing_numbers_are_no_change():
    x = X.clone()
    x[0, 0] = torch.nan

    def criterion(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.nan_to_num(), targets)

    model = nn.Sequential(network(), nn.Identity())
    problem = Problem(model, criterion, (x, Y))
    assert problem.value() == problem.initial_loss


class Writes(nn.Module):
    """Normalises its inputs in place, in the caller's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.5).mul_(2))


def writes_too(output: Tensor, targets: Tensor) -> Tensor:
    targets[targets == 2] = 0
    return nn.functional.cross_entropy(output.mul_(2), targets)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), writes_too])
@pytest.mark.parametrize("cut", [24, 7])
def test_the_callers_tensors_are_never_changed(criterion, cut):
    x, y = X.clone(), Y.clone()
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    values = [
        measure(
            Writes(), criterion, batches, ("top_eigenvalue", "sam_worst", "m_sharpness", "batch_sharpness")
        )
        for _ in range(2)
    ]
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    truth = difference_hessian(Writes(), criterion, X, Y.clone())
    for report in values:
        assert report["top_eigenvalue"].value == pytest.approx(
            float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-3
        )
        assert report["sam_worst"].value == values[0]["sam_worst"].value
    problem = Problem(Writes(), criterion, batches)
    torch.testing.assert_close(Hessian(problem).dense(), truth, rtol=0, atol=1e-8)


def test_measures_in_the_inputs_work_where_the_inputs_are_written_into():
    inputs = X.sigmoid()
    report = measure(Writes(), nn.CrossEntropyLoss(), (inputs, Y), ("input_sharpness", "pgd_accuracy"))
    plain = nn.Sequential(Shifted(), network())
    other = measure(plain, nn.CrossEntropyLoss(), (inputs, Y), ("input_sharpness", "pgd_accuracy"))
    for name in ("input_sharpness", "pgd_accuracy"):
        assert report[name].value == pytest.approx(other[name].value)
    problem = Problem(Writes(), nn.CrossEntropyLoss(), (inputs, Y))
    assert bool((Hessian(problem, wrt="inputs") @ torch.ones(96, dtype=torch.float64)).any())


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 2
