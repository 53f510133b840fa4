"""How good a model is: accuracy and loss of the main branch, clean and under attack."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Batch, ImageSet, as_float
from conadv_lab.methods.attack import PGDAttack
from conadv_lab.methods.forwards import logits, outputs_of
from conadv_lab.models.mixture import MixtureBatchNorm
from conadv_lab.models.norm import branch_of, recalibrate
from conadv_lab.training.build import EVALUATION_BATCH, Parts


def calibrated_copy(parts: Parts, model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode, its main statistics re-estimated; the original goes on untouched."""
    judged = copy.deepcopy(model)
    if parts.config.training.bn_recalibrate:
        dtype = next(judged.parameters()).dtype
        recalibrate(judged, (images.to(dtype) for images in parts.calibration()))
    return judged.eval()


def statistics_used(parts: Parts) -> str:
    """Which statistics batch norm is judged by, in words, for results and reports."""
    training = parts.config.training
    if not any(isinstance(module, MixtureBatchNorm) for module in parts.model.modules()):
        return "no batch norm"
    if not training.bn_recalibrate:
        return "running averages of training"
    count = min(training.bn_recalibrate, len(parts.train_set))
    return f"re-estimated on {count:,} training images as training sees them"


def evaluate(parts: Parts, judged: nn.Module, train_images: int = 10_000) -> dict[str, float]:
    """Accuracies in percent and mean losses of a model in evaluation mode, on the test and the training set.

    The training set is judged without augmentation, on its first ``train_images`` images at most.
    """
    test_accuracy, test_loss = accuracy_and_loss(judged, parts.test_set)
    train_accuracy, train_loss = accuracy_and_loss(judged, parts.train_set, train_images)
    figures = {
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        "train_test_gap": train_accuracy - test_accuracy,
        "test_loss": test_loss,
        "train_loss": train_loss,
    }
    if parts.config.training.mirror:
        figures["test_accuracy_mirrored"], _ = accuracy_and_loss(judged, parts.test_set, mirror=True)
    if parts.config.training.pgd_images:
        figures["pgd_accuracy"] = pgd_accuracy(parts, judged)
    return figures


@torch.no_grad()
def accuracy_and_loss(
    judged: nn.Module, images: ImageSet, limit: int | None = None, *, mirror: bool = False
) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy, without label smoothing.

    With ``mirror``, logits are averaged over each image and its mirror image: test-time augmentation.
    """
    dtype = next(judged.parameters()).dtype
    right, loss, seen = 0, 0.0, 0
    for batch in batches(images, limit):
        pixels = batch.images.to(dtype)
        outputs = logits(outputs_of(judged, pixels))
        if mirror:
            outputs = (outputs + logits(judged(pixels.flip(3)))) / 2
        right += int((outputs.argmax(1) == batch.labels).sum())
        loss += float(nn.functional.cross_entropy(outputs, batch.labels, reduction="sum"))
        seen += len(batch.labels)
    return 100 * right / seen, loss / seen


def pgd_accuracy(parts: Parts, judged: nn.Module) -> float:
    """Accuracy in percent on test images attacked by 10 steps of ε/4 through the main branch.

    A single-step method whose robustness collapses (Wong et al. 2020) shows here, and in no other figure. An attack
    keeps activations as training does, so it takes no more images at once.
    """
    config = parts.config
    epsilon = config.method.epsilon
    attack = PGDAttack(
        epsilon,
        (epsilon / 4) or None,
        seed=config.training.seed,
        norm=config.method.norm,
        branch="main",
    )
    dtype = next(judged.parameters()).dtype
    right = seen = 0
    size = min(EVALUATION_BATCH, config.training.micro_batch or EVALUATION_BATCH)
    for batch in batches(parts.test_set, config.training.pgd_images, size):
        batch = Batch(batch.images.to(dtype), batch.labels, batch.epochs, batch.indices, batch.share)
        images = attack.apply(batch, attack.perturb(judged, batch, parts.criterion))
        with torch.no_grad(), branch_of(judged, "main"):
            right += int((logits(judged(images)).argmax(1) == batch.labels).sum())
        seen += len(batch.labels)
    return 100 * right / seen


def batches(images: ImageSet, limit: int | None = None, size: int = EVALUATION_BATCH) -> Iterator[Batch]:
    """The set in its own order, in evaluation batches, as floats."""
    count = len(images) if limit is None else min(limit, len(images))
    for first in range(0, count, size):
        indices = torch.arange(first, min(first + size, count), device="cpu")
        pixels, labels = images.fetch(indices)
        indices = indices.to(labels.device)
        yield Batch(as_float(pixels), labels, torch.zeros_like(indices), indices, len(labels) / count)


def fixed_images(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a set as floats, with labels: what curvature is measured on."""
    pixels, labels = images.fetch(torch.arange(min(count, len(images)), device="cpu"))
    return as_float(pixels), labels
