"""A recipe beside a plain PyTorch loop: ``python -m benchmarks.control RECIPE [--seeds N] [--data-dir DIR]``.

Both train the recipe's network from the same initial weights, on the same images, for the same number of steps, and
both accuracies are printed with their spread over the seeds. The loop uses only torch: its SGD, batch norm with running
averages, crops and flips of a whole batch with torch's generator, and `LambdaLR`. Anything lost between gradient and
reported accuracy shows here: an evaluation with the wrong statistics, a wrong augmentation, a schedule that ends early.
It supports vanilla SGD only and refuses other recipes.

``--out DIR`` keeps the run folders; a finished run with the same config is not repeated.
"""

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.accuracy import Options, command, kept_or_scratch, over_seeds, run_folder, seeds_of, trained
from benchmarks.harness import Row, write
from conadv_lab.config import Config, Data, Model, Optimization, resolved
from conadv_lab.data.loader import as_float
from conadv_lab.models.norm import plain_batch_norm
from conadv_lab.optim.options import SCHEDULES
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import Parts, build
from conadv_lab.training.resuming import reconciled

MIRRORED = {
    "dataset", "data_dir", "download", "train_images", "synthetic_images", "synthetic_pixels", "crop", "crop_padding",
    "flip", "flip_rule", "cutout", "workers", "keep_gb", "reader",
    "model", "last_gamma", "precision", "channels_last", "compile", "compile_mode", "ema",
    "lr", "base_lr", "base_batch", "lr_rule", "momentum", "nesterov", "weight_decay", "bias_lr_factor",
    "label_smoothing", "schedule", "warmup_epochs", "warmup_steps", "end_lr", "power", "milestone_epochs",
    "decay_factor",
}  # fmt: skip
"""Fields of data, model and optimisation that the loop honours, or that cannot change what is learnt."""


def require_plain(config: Config) -> None:
    """Raise ``ValueError`` if the loop cannot do what the config says."""
    method, training = config.method.method, config.training
    if method != "vanilla":
        raise ValueError(f"method is {method!r}; allowed beside a plain loop: 'vanilla' (--method vanilla)")
    if config.data.source.photographs:
        raise ValueError(
            f"dataset is {config.data.dataset!r}; allowed beside a plain loop: a data set held in memory"
        )
    for section in (Data, Model, Optimization):
        values = getattr(config, section.__name__.lower())
        for field in dataclasses.fields(section):
            value = getattr(values, field.name)
            if field.name not in MIRRORED and value != field.default:
                raise ValueError(f"{field.name} is {value!r}; allowed beside a plain loop: {field.default!r}")
    if SCHEDULES[config.optimization.schedule].ceiling is not None:
        raise ValueError(
            f"schedule is {config.optimization.schedule!r}; allowed beside a plain loop: one that ignores losses"
        )
    if training.micro_batch not in (None, training.global_batch):
        raise ValueError(f"micro_batch is {training.micro_batch}; allowed beside a plain loop: None")


def plain_accuracy(parts: Parts) -> float:
    """Test accuracy in percent of a network trained from its present weights by a plain loop."""
    config, device, steps = parts.config, parts.device, parts.stream.steps
    images, labels = parts.train_set.fetch(torch.arange(len(parts.train_set)))
    test_images, test_labels = parts.test_set.fetch(torch.arange(len(parts.test_set)))
    torch.manual_seed(config.training.seed)

    model = plain_batch_norm(parts.model).train()
    dtype = next(model.parameters()).dtype
    optimizer = sgd(model, config.optimization)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(config, steps, len(images)))
    criterion = nn.CrossEntropyLoss(label_smoothing=config.optimization.label_smoothing)
    averaged = None
    if config.model.ema:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.model.ema))

    begins_mirrored = torch.rand(len(images), device=device) < 0.5
    order = shuffled(len(images), config.training.global_batch, device)
    for epoch, chosen in islice(order, steps):
        mirrored = torch.rand(len(chosen), device=device) < 0.5
        if config.data.flip_rule == "alternating":
            mirrored = begins_mirrored[chosen] ^ (epoch % 2 == 1)
        x = augmented(as_float(images[chosen]), config.data, mirrored).to(dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.model.precision == "bfloat16"):
            loss = criterion(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)

    judged = (model if averaged is None else averaged.module).eval()
    right = 0
    with torch.no_grad():
        for x, y in zip(test_images.split(500), test_labels.split(500), strict=True):
            right += int((judged(as_float(x).to(dtype)).argmax(1) == y).sum())
    return 100 * right / len(test_labels)


def sgd(model: nn.Module, section: Optimization) -> torch.optim.SGD:
    """torch's SGD; only weights are decayed, and batch norm biases may have a separate learning rate."""
    lr = section.lr or 0.0
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    biases = {id(norm.bias) for norm in norms}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1 and id(p) not in biases]},
        {"params": [p for p in trained if id(p) in biases], "lr": lr * section.bias_lr_factor},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=lr, momentum=section.momentum, nesterov=section.nesterov)


def shuffled(count: int, batch: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(epoch, indices) of batches, epoch after epoch, each in a new order, dropping the incomplete last batch."""
    for epoch in itertools.count():
        for chosen in torch.randperm(count, device=device).split(batch)[: count // batch]:
            yield epoch, chosen


def augmented(images: Tensor, data: Data, mirrored: Tensor) -> Tensor:
    """Random crops of padded images, horizontal flips where ``mirrored``, and cutout, for a whole batch at once."""
    count, channels, height, width = images.shape
    device = images.device
    if data.flip:
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if data.crop:
        mode = "reflect" if data.crop_padding == "reflect" else "constant"
        padded = F.pad(images, [data.crop] * 4, mode)
        top, left = torch.randint(0, 2 * data.crop + 1, (2, count, 1, 1, 1), device=device)
        rows = top + torch.arange(height, device=device).view(1, 1, -1, 1)
        columns = left + torch.arange(width, device=device).view(1, 1, 1, -1)
        image = torch.arange(count, device=device).view(-1, 1, 1, 1)
        images = padded[image, torch.arange(channels, device=device).view(1, -1, 1, 1), rows, columns]
    if data.cutout:
        first_row = torch.randint(0, height, (count, 1, 1, 1), device=device) - data.cutout // 2
        first_column = torch.randint(0, width, (count, 1, 1, 1), device=device) - data.cutout // 2
        row = torch.arange(height, device=device).view(1, 1, -1, 1)
        column = torch.arange(width, device=device).view(1, 1, 1, -1)
        inside = (row >= first_row) & (row < first_row + data.cutout)
        inside = inside & (column >= first_column) & (column < first_column + data.cutout)
        images = images.masked_fill(inside, 0.0)
    return images


def factor(config: Config, steps: int, images: int) -> Callable[[int], float]:
    """The factor on the peak learning rate at a step, for `LambdaLR`."""
    section, per_epoch = config.optimization, images / config.training.global_batch
    warmup = section.warmup_steps
    if warmup is None:
        warmup = round(section.warmup_epochs * per_epoch)
    end = section.end_lr / section.lr if section.lr else 0.0

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if section.schedule == "cosine":
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))
        if section.schedule == "polynomial":
            return end + (1 - end) * (1 - done) ** section.power
        if section.schedule == "step":
            reached = [epoch for epoch in section.milestone_epochs if step >= round(epoch * per_epoch)]
            return section.decay_factor ** len(reached)
        return 1.0

    return at


def own_accuracy(config: Config, folder: Path) -> float:
    """Test accuracy in percent of the package's run, which may already be finished."""
    result = RunFolder(folder).result()
    if result is not None:
        reconciled(config, RunFolder(folder), resume=True)  # refuses a folder with another config
        return result["test_accuracy"]
    return trained(config, folder, resume=True).accuracies["test accuracy"]


def measure(recipe: str, config: Config, options: Options) -> list[Row]:
    """Both sides' accuracies, seed by seed, written out as they are measured."""
    config = resolved(config)
    require_plain(config)
    ours: dict[int, float] = {}
    control: dict[int, float] = {}
    rows: list[Row] = []
    with kept_or_scratch(options.out) as folder:
        for one in seeds_of(config, options.seeds):
            seed = one.training.seed
            ours[seed] = own_accuracy(one, run_folder(folder, recipe, one))
            control[seed] = plain_accuracy(build(one))
            rows = rows_of(recipe, ours, control)
            if options.json:
                write(rows, options.json)
    return rows


def rows_of(recipe: str, ours: Mapping[int, float], control: Mapping[int, float]) -> list[Row]:
    """Both sides over their seeds, and how far the package is above the plain loop."""
    apart = [ours[seed] - control[seed] for seed in ours]
    rows = over_seeds(f"{recipe}, test accuracy", ours) + over_seeds("plain loop, test accuracy", control)
    rows.append(Row("above the plain loop, mean", statistics.mean(apart), "points"))
    if len(apart) > 1:
        error = statistics.stdev(apart) / len(apart) ** 0.5
        rows.append(Row("above the plain loop, standard error", error, "points"))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command("benchmarks.control", __doc__ or "", Options(), words, measure)


if __name__ == "__main__":
    sys.exit(main())
