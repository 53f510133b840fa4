"""Means that are not over examples: batches count by what the loss divides by, or are refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conadv_lab.sharpness.measures.front import measure
from conadv_lab.sharpness.operators.matrices import EmpiricalFisher, Fisher, Hessian
from conadv_lab.sharpness.problem.groups import groups as groups_of
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import cross_check
from conadv_lab.sharpness.spectrum.exact import exact_trace
from tests.elsewhere import elsewhere
from tests.sharpness.oracle import difference_hessian
from tests.sharpness.zoo import LOSSES, REFUSED, real

N = 150


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, classes)).double()


def ignored() -> Tensor:
    """150 labels, 100 of them ignored, unevenly among the batches."""
    labels = torch.arange(N) % 3
    labels[2:10] = labels[42:50] = labels[56:140] = -100
    return labels


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).cumsum(1).tanh())


def next_token(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def padded() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 7, (24, 8), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    for row in range(24):
        labels[row, 2 + row // 4 :] = -100
    return tokens, labels


X = real(N, 4)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0]).double()
SMOOTH = torch.rand(N, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
SUBJECTS = {
    "ignored labels": (network(), nn.CrossEntropyLoss(), X, ignored()),
    "ignored labels, by the function": (network(), F.cross_entropy, X, ignored()),
    "another ignored label": (network(), nn.CrossEntropyLoss(ignore_index=2), X, torch.arange(N) ** 2 % 5 % 3),
    "class weights": (network(), nn.CrossEntropyLoss(WEIGHTS), X, torch.arange(N) // 30 % 3),
    "class weights, ignored labels": (network(), nn.CrossEntropyLoss(WEIGHTS), X, ignored()),
    "smoothed class weights": (network(), nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), X, ignored()),
    "half of it": (network(), lambda f, y: 0.5 * F.cross_entropy(f, y), X, ignored()),
    "NLL": (nn.Sequential(network(), nn.LogSoftmax(1)), nn.NLLLoss(WEIGHTS), X, ignored()),
    "soft labels, class weights": (
        network(), nn.CrossEntropyLoss(WEIGHTS), X, SMOOTH / SMOOTH.sum(1, keepdim=True)
    ),
    "a language model": (LanguageModel().double(), next_token, *padded()),
}  # fmt: skip
CUTS = (7, 40, 29)  # batches, the last one what is left


def batches_of(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    sizes, left = [], len(x)
    for size in CUTS:
        sizes.append(min(size, left - 1))
        left -= sizes[-1]
        if left <= 1:
            break
    return list(zip(x.split([*sizes, left]), y.split([*sizes, left]), strict=True))


@pytest.mark.parametrize("name", SUBJECTS)
def test_batches_count_by_what_the_loss_divides_by(name: str) -> None:
    model, criterion, x, y = SUBJECTS[name]
    truth = difference_hessian(model, criterion, x, y)
    whole = Problem(model, criterion, (x, y))
    for data in ((x, y), batches_of(x, y)):
        problem = Problem(model, criterion, data)
        assert problem.initial_loss == pytest.approx(float(criterion(model(x), y)), rel=1e-12)
        assert problem.value() == pytest.approx(problem.initial_loss, rel=1e-12)
        torch.testing.assert_close(problem.gradient, whole.gradient)
        torch.testing.assert_close(Hessian(problem).dense(), truth, rtol=0, atol=1e-8)
        report = measure(model, criterion, data, ("trace", "top_eigenvalue", "ggn_trace"))
        assert abs(report["trace"].value - float(truth.trace())) <= 2 * report["trace"].error + 1e-8
        assert report["top_eigenvalue"].value == pytest.approx(
            float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-3
        )
    groups = groups_of(Problem(model, criterion, batches_of(x, y)), 6)
    total = sum(share * group.value_and_gradient()[1] for group, share in groups)
    torch.testing.assert_close(total, whole.gradient)


def test_the_exact_trace_of_many_ignored_labels_is_exact() -> None:
    model, criterion, x, y = SUBJECTS["ignored labels"]
    truth = float(difference_hessian(model, criterion, x, y).trace())
    for data in ((x, y), batches_of(x, y)):
        assert exact_trace(Problem(model, criterion, data)).value == pytest.approx(truth, abs=1e-8)


def of_its_own(output: Tensor, targets: Tensor) -> Tensor:
    """A mean that no loss of torch makes, over labels that count."""
    counts = (targets >= 0).double()
    return (F.cross_entropy(output, targets.clamp_min(0), reduction="none") * counts).sum() / counts.sum()


def contrastive(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T / 3, torch.arange(len(output)))


def similar(output: Tensor, targets: Tensor) -> Tensor:
    return (output @ output.T).square().mean()


def two_means(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets) + F.mse_loss(output, torch.zeros_like(output))


@pytest.mark.parametrize("criterion", [of_its_own, contrastive, two_means])
def test_another_mean_is_measured_in_one_batch_and_refused_in_two(criterion) -> None:
    model, y = network(), ignored()
    truth = difference_hessian(model, criterion, X, y)
    report = measure(model, criterion, (X, y), ("trace", "top_eigenvalue"))
    assert report["trace"].conditions["method"] != "exact"
    assert abs(report["trace"].value - float(truth.trace())) <= 2 * report["trace"].error + 1e-8
    for batches in (batches_of(X, y), batches_of(X, y)[::-1]):
        with pytest.raises(ValueError, match="is not a mean over examples"):
            Problem(model, criterion, batches)
    with pytest.raises(ValueError, match="cannot be split into groups"):
        measure(model, criterion, (X, y), ("m_sharpness",), m=10)


def test_a_mean_of_ones_own_is_tried_between_batches_too() -> None:
    """Within each batch all examples count alike, so that only two batches together show it."""
    labels = torch.arange(N) % 3
    pairs = torch.stack([labels, labels], 1)
    pairs[75:, 1] = -1

    def both(output: Tensor, targets: Tensor) -> Tensor:
        counts = (targets >= 0).double()
        each = F.cross_entropy(output[:, :, None].expand(-1, -1, 2), targets.clamp_min(0), reduction="none")
        return (each * counts).sum() / counts.sum()

    with pytest.raises(ValueError, match="is not a mean over examples"):
        Problem(network(), both, list(zip(X.split(75), pairs.split(75), strict=True)))


def test_batches_of_one_example_are_tried_beside_one_another() -> None:
    def positions(output: Tensor, targets: Tensor) -> Tensor:
        counts = (targets >= 0).double()
        each = (output[:, :, None] - targets[:, None]).square().mean(1)
        return (each * counts).sum() / counts.sum()

    y = real(5, 4)
    with pytest.raises(ValueError, match="is not a mean over examples"):
        Problem(network(), positions, list(zip(X[:5].split(1), y.split(1), strict=True)))


def test_a_mean_over_examples_of_ones_own_is_weighed_by_examples() -> None:
    def squares(output: Tensor, targets: Tensor) -> Tensor:
        return (output.sum(1) - targets).square().mean()

    y = real(N, 2).sum(1)
    truth = difference_hessian(network(), squares, X, y)
    problem = Problem(network(), squares, batches_of(X, y))
    assert problem.mean.over_examples
    torch.testing.assert_close(Hessian(problem).dense(), truth, rtol=0, atol=1e-8)


def test_a_batch_without_a_label_that_counts_is_told() -> None:
    y = ignored()
    y[:50] = -100
    with pytest.raises(ValueError, match="batch 0 has no label that counts"):
        Problem(network(), nn.CrossEntropyLoss(), list(zip(X.split(50), y.split(50), strict=True)))


@pytest.mark.parametrize("name", ["gradient_noise_scale", "input_sharpness", "fisher_rao"])
def test_measures_of_single_examples_refuse_labels_that_count_unlike(name: str) -> None:
    with pytest.raises(ValueError, match="count equally"):
        measure(network(), nn.CrossEntropyLoss(), batches_of(X, ignored()), (name,))


def test_fishers_and_the_cross_check_refuse_them_too() -> None:
    problem = Problem(network(), nn.CrossEntropyLoss(), batches_of(X, ignored()))
    for operator in (Fisher, EmpiricalFisher):
        with pytest.raises(ValueError, match="count equally"):
            operator(problem) @ problem.weights()
    with pytest.raises(ValueError, match="count equally"):
        cross_check(problem)


def test_accuracy_is_over_labels_that_count() -> None:
    x = X[ignored() >= 0]
    y = network()(x).argmax(1)
    some = torch.cat([y, torch.full((len(y),), -100)])
    found = [
        measure(network(), nn.CrossEntropyLoss(), data, ("pac_bayes_flatness",), draws=2)[
            "pac_bayes_flatness"
        ]
        for data in ((x, y), (torch.cat([x, x]), some))
    ]
    assert [f.conditions["accuracy"] for f in found] == [1.0, 1.0]
    assert found[0].value == found[1].value


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - REFUSED.keys()))
def test_each_loss_of_torch_is_the_same_in_two_batches(name: str) -> None:
    model, criterion, y = LOSSES[name]
    x = real(len(y), 4)
    whole = Hessian(Problem(model, criterion, (x, y))).dense()
    parts = Problem(
        model, criterion, list(zip(x.split([2, len(y) - 2]), y.split([2, len(y) - 2]), strict=True))
    )
    torch.testing.assert_close(Hessian(parts).dense(), whole, rtol=1e-9, atol=1e-12)


def test_batches_of_longer_sequences_count_for_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1)).double()
    batches = [(real(6, 2, length + 1), torch.arange(6 * length).view(6, length) % 3) for length in (3, 8)]
    for criterion in (nn.CrossEntropyLoss(), lambda f, y: 2 * F.cross_entropy(f, y)):
        one, other = (difference_hessian(model, criterion, x, y) for x, y in batches)
        problem = Problem(model, criterion, batches)
        torch.testing.assert_close(Hessian(problem).dense(), (3 * one + 8 * other) / 11, rtol=0, atol=1e-8)
        assert problem.mean.uniform
        assert not problem.mean.over_examples


def test_a_mask_before_the_loss_counts_as_ignored_labels_do() -> None:
    def selected(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output[targets >= 0], targets[targets >= 0])

    model, y = network(), ignored()
    problem = Problem(model, selected, batches_of(X, y))
    truth = difference_hessian(model, nn.CrossEntropyLoss(), X, y)
    torch.testing.assert_close(Hessian(problem).dense(), truth, rtol=0, atol=1e-8)
    assert not problem.mean.uniform


def test_means_are_found_out_wherever_the_default_device_is() -> None:
    batches, model = batches_of(X, ignored()), network()
    with elsewhere():
        Problem(model, nn.CrossEntropyLoss(), batches)
        with pytest.raises(ValueError, match="is not a mean over examples"):
            Problem(model, similar, batches)
