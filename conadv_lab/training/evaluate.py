"""Evaluation: accuracy and loss of the main branch, clean and under attack."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from conadv_lab.criteria import logits
from conadv_lab.data.loader import Batch, ImageSet, as_float
from conadv_lab.methods.forwards import outputs_of
from conadv_lab.methods.robustness import EvaluationAttack, right_under_attack
from conadv_lab.models.mixture import MixtureBatchNorm
from conadv_lab.models.norm import branch_of, recalibrate
from conadv_lab.training.build import EVALUATION_BATCH, Parts
from conadv_lab.training.distributed import ALONE, Ranks
from conadv_lab.training.network import Autocast


def calibrated_copy(parts: Parts, model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode with re-estimated main statistics; the original is not changed.

    A collective call: trainers share the work and all get the same copy, on a CPU bit for bit that of one rank.
    """
    judged = copy.deepcopy(model)
    if parts.config.training.bn_recalibrate:
        network, dtype = _in_precision(parts, judged), next(judged.parameters()).dtype
        if parts.ranks.trainers == 1:
            recalibrate(network, (images.to(dtype) for images in parts.calibration()))
        else:
            _recalibrate_together(parts, judged, network, dtype)
    return judged.eval()


@torch.no_grad()
def _recalibrate_together(parts: Parts, judged: nn.Module, network: nn.Module, dtype: torch.dtype) -> None:
    """Split the groups over the trainers, and average their statistics in a fixed order."""
    statistics = _main_statistics(judged)
    if not statistics:
        return
    mine = slice(parts.ranks.number, None, parts.ranks.trainers)
    sizes = [values.numel() for values in statistics]
    found = torch.zeros(len(parts.calibration_groups()), sum(sizes), dtype=dtype, device="cpu")
    for row, images in zip(found[mine], parts.calibration(mine), strict=True):
        recalibrate(network, [images.to(dtype)])
        row.copy_(torch.cat([values.flatten() for values in statistics]))
    groups = parts.ranks.filled(found).to(parts.device)
    for number, group in enumerate(groups, 1):
        parts_of = [part.view_as(v) for part, v in zip(group.split(sizes), statistics, strict=True)]
        torch._foreach_lerp_(statistics, parts_of, 1.0 / number)


def _main_statistics(model: nn.Module) -> list[Tensor]:
    norms = [module.main for module in model.modules() if isinstance(module, MixtureBatchNorm)]
    return [
        buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
    ]


def _in_precision(parts: Parts, judged: nn.Module) -> nn.Module:
    """The network in the run's precision, not compiled: compiling takes longer than most evaluations."""
    return Autocast(judged, parts.device.type) if parts.config.model.precision == "bfloat16" else judged


def statistics_used(parts: Parts) -> str:
    """Which batch norm statistics the evaluation uses, in words, for results and reports."""
    training = parts.config.training
    if not any(isinstance(module, MixtureBatchNorm) for module in parts.model.modules()):
        return "no batch norm"
    if not training.bn_recalibrate:
        return "running averages of training"
    count = min(training.bn_recalibrate, len(parts.train_set))
    return f"re-estimated on {count:,} augmented training images"


def evaluate(parts: Parts, judged: nn.Module, train_images: int = 10_000) -> dict[str, float]:
    """Accuracies in percent and mean losses of a model in evaluation mode, on the test and the training set.

    The training set is evaluated without augmentation, on at most its first ``train_images`` images. A collective call:
    trainers share the images and all get the same values, on a CPU bit for bit those of one rank. The network runs in
    the run's precision: under bfloat16 autocast a few images near the decision boundary may change sides.
    """
    network, ranks = _in_precision(parts, judged), parts.ranks
    test_accuracy, test_loss = accuracy_and_loss(network, parts.test_set, ranks=ranks)
    train_accuracy, train_loss = accuracy_and_loss(network, parts.train_set, train_images, ranks=ranks)
    figures = {
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        "train_test_gap": train_accuracy - test_accuracy,
        "test_loss": test_loss,
        "train_loss": train_loss,
    }
    if parts.config.training.mirror:
        mirrored = accuracy_and_loss(network, parts.test_set, mirror=True, ranks=ranks)
        figures["test_accuracy_mirrored"] = mirrored[0]
    if parts.config.training.pgd_images:
        figures["pgd_accuracy"] = pgd_accuracy(parts, network)
    return figures


def accuracy_and_loss(
    judged: nn.Module,
    images: ImageSet,
    limit: int | None = None,
    *,
    mirror: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy, without label smoothing.

    With ``mirror``, logits are averaged over each image and its horizontal flip: test-time augmentation.
    """
    dtype = next(judged.parameters()).dtype

    @torch.no_grad()
    def judge(batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = batch.images.to(dtype)
        outputs = logits(outputs_of(judged, pixels))
        if mirror:
            outputs = (outputs + logits(judged(pixels.flip(3)))) / 2
        loss = nn.functional.cross_entropy(outputs, batch.labels, reduction="sum")
        return (outputs.argmax(1) == batch.labels).sum(), loss

    return _over_batches(judge, images, limit, EVALUATION_BATCH, ranks)


def pgd_accuracy(parts: Parts, judged: nn.Module) -> float:
    """Accuracy in percent on test images under `EvaluationAttack` with the run's ε, through the main branch.

    Catastrophic overfitting of a single-step method (Wong et al. 2020) shows in this metric alone. An attack stores
    activations as training does, so it takes no more images at once.
    """
    training, section = parts.config.training, parts.config.method
    attack = EvaluationAttack(section.epsilon, training.pgd_steps, section.norm, training.seed)
    dtype = next(judged.parameters()).dtype

    def outputs(images: Tensor) -> Tensor:
        with branch_of(judged, "main"):
            return logits(judged(images))

    def judge(batch: Batch) -> tuple[Tensor, Tensor]:
        batch = Batch(batch.images.to(dtype), batch.labels, batch.epochs, batch.indices, batch.share)
        right = right_under_attack(attack, judged, batch, parts.criterion, outputs)
        return right, torch.zeros_like(right)

    size = min(EVALUATION_BATCH, training.micro_batch or EVALUATION_BATCH)
    return _over_batches(judge, parts.test_set, training.pgd_images, size, parts.ranks)[0]


def _over_batches(
    judge: Callable[[Batch], tuple[Tensor, Tensor]],
    images: ImageSet,
    limit: int | None,
    size: int,
    ranks: Ranks,
) -> tuple[float, float]:
    """Accuracy in percent and mean loss from each batch's number of correct images and summed loss.

    The batches are split over the trainers; results are summed in the order of the set, so ranks change no bit.
    """
    count = len(images) if limit is None else min(limit, len(images))
    mine = slice(ranks.number, None, ranks.trainers)
    own = [torch.stack([x.double() for x in judge(batch)]) for batch in batches(images, limit, size, mine)]
    told = torch.zeros(len(range(0, count, size)), 2, dtype=torch.float64, device="cpu")
    if own:
        told[mine] = torch.stack(own).to(told)  # the only synchronisation with a GPU
    right, loss = 0, 0.0
    for of_batch, loss_of_batch in ranks.filled(told).tolist():
        right += int(of_batch)
        loss += loss_of_batch
    return 100 * right / count, loss / count


def batches(
    images: ImageSet, limit: int | None = None, size: int = EVALUATION_BATCH, part: slice = slice(None)
) -> Iterator[Batch]:
    """The set in order, in evaluation batches of floats; or ``part`` of these batches."""
    count = len(images) if limit is None else min(limit, len(images))
    for first in range(0, count, size)[part]:
        indices = torch.arange(first, min(first + size, count), device="cpu")
        pixels, labels = images.fetch(indices)
        indices = indices.to(labels.device)
        yield Batch(as_float(pixels), labels, torch.zeros_like(indices), indices, len(labels) / count)


def fixed_images(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a set as floats, with labels; curvature is measured on these."""
    pixels, labels = images.fetch(torch.arange(min(count, len(images)), device="cpu"))
    return as_float(pixels), labels
