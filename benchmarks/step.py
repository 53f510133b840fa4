"""What a training step costs: this package against a plain PyTorch loop, and the methods against vanilla.

    python -m benchmarks.step [--json FILE] [--rounds N] [--models resnet18 digits-cnn] [--methods sam …] [--batch N]
        [--threads N]

Rows of the first model are named after the method alone; the others also name the model.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import GPU_REPEATS, Options, Row, interleaved, publish
from conadv_lab.config import Config, resolved
from conadv_lab.methods import METHODS as ALL
from conadv_lab.methods.attack import WARM_UPDATES
from conadv_lab.mistakes import unknown
from conadv_lab.models.digits import DigitsCNN
from conadv_lab.models.resnet import resnet18, resnet20, resnet50
from conadv_lab.recipes import digits
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import build
from conadv_lab.training.loop import Run

METHODS = (
    "disadv", "conadv", "recycled", "recycled-equal", "sam", "asyncsam", "sampa", "msam", "extrap",
)  # fmt: skip
HOST_MODEL = "resnet50"
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "digits-cnn": DigitsCNN,
}
BATCHES = {"resnet18": 32, "resnet20": 128, "resnet50": 16, "digits-cnn": 256}
MICRO_BATCHES = 8
LR, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 5e-4, 1_000_000
WARM = WARM_UPDATES + 5
"""Steps before any timing: the attack uses the adversarial statistics only once they are warm, and a captured step
needs three more."""


def plain_loop(
    model: nn.Module, batch: int, images: Tensor, labels: Tensor, bfloat16: bool = False
) -> Callable[[], None]:
    """The peer: a plain PyTorch loop with the same model, data, precision and schedule."""
    criterion = nn.CrossEntropyLoss()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=images.is_cuda or None)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    def batches() -> Iterator[Tensor]:
        while True:
            shuffled = torch.randperm(len(labels), device=labels.device)
            for first in range(0, len(labels) - batch + 1, batch):
                yield shuffled[first : first + batch]

    order = batches()

    def step() -> None:
        chosen = next(order)
        x = images[chosen].float() / 255
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = criterion(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # A loop fit for a long run checks its loss.
        if not loss.is_cuda and not torch.isfinite(loss):
            raise ArithmeticError("loss")

    return step


def our_run(model_name: str, method: str, batch: int, folder: Path) -> Run:
    """A started run of this package; every ``train_step`` is a whole step with everything that belongs to it."""
    base = digits.vanilla() if model_name == "digits-cnn" else Config()
    dataset: dict[str, Any] = (
        {} if model_name == "digits-cnn" else {"dataset": "synthetic", "synthetic_images": 2_048}
    )
    config = base.replace(
        **dataset,
        model=model_name,
        method=method,
        epsilon=0.01,
        global_batch=batch,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        warmup_epochs=0,
        steps=STEPS,
        log_every=STEPS,
        checkpoint_every=STEPS,
        threads=torch.get_num_threads(),
    )
    return started(config, folder / method)


def started(config: Config, folder: Path) -> Run:
    """A run before its first step."""
    run = Run(build(resolved(config)), RunFolder(folder), "none")
    run.start()
    return run


def measure(model_name: str, options: "StepOptions", suffix: str) -> list[Row]:
    batch, methods = options.batch or BATCHES[model_name], options.methods
    with tempfile.TemporaryDirectory() as scratch:
        runs = {m: our_run(model_name, m, batch, Path(scratch)) for m in ("vanilla", *methods)}
        parts = runs["vanilla"].parts
        images, labels = parts.train_set.fetch(torch.arange(min(len(parts.train_set), 2_048)))
        calls: dict[str, Callable[[], None]] = {name: run.train_step for name, run in runs.items()}
        model = PLAIN[model_name]().to(parts.device)
        if parts.config.model.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls["plain loop"] = plain_loop(model, batch, images, labels)
        for _ in range(WARM):
            for call in calls.values():
                call()
        on_gpu = parts.device.type == "cuda"
        times = interleaved(calls, options.rounds, cuda=on_gpu, repeats=GPU_REPEATS if on_gpu else 1)
    rows = [_named(times.row("vanilla", "plain loop"), f"overhead{suffix}")]
    rows += [_named(times.row(method, "vanilla"), f"{method}{suffix}") for method in methods]
    return rows


def host_part(model_name: str, folder: Path, steps: int = 200) -> Row:
    """Host time in µs of a captured ConAdv step of 8 micro-batches: everything but the device's work."""
    config = our_run(model_name, "conadv", 8 * MICRO_BATCHES, folder).config.replace(micro_batch=8)
    run = started(config, folder / "host part")
    run.train_step()
    method, network, criterion = run.parts.method, run.network, run.parts.criterion
    run.program.replays.backend = cast(Any, object())  # called for a step's kind only
    times = []
    for number in range(run.step, run.step + steps):
        begun = time.perf_counter()
        step = run.prepared(number, run.parts.schedule(number))
        method.begin(network, step, criterion)
        run.program.kind(step)
        method.end(step)
        times.append(time.perf_counter() - begun)
    return Row(f"host part, {model_name}, {MICRO_BATCHES} micro-batches", 1e6 * median(times), "µs")


def _named(row: Row, name: str) -> Row:
    return Row(name, row.value, row.unit, row.peer, row.ratio, row.spread)


@dataclass(frozen=True)
class StepOptions(Options):
    rounds: int = 9
    models: tuple[Literal["resnet18", "resnet20", "resnet50", "digits-cnn"], ...] = ("resnet18", "digits-cnn")
    """Networks to train."""
    methods: tuple[str, ...] = METHODS
    """Methods to time beside vanilla."""
    batch: int | None = None  # Images per step; None: the model's default.
    threads: int | None = None  # CPU threads; None: all cores.

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in ALL:
                raise unknown("method", method, ALL)


def main() -> None:
    from conadv_lab.cli import asked  # imagenet_gpu imports this file without having tyro

    options = asked(StepOptions, None, "benchmarks.step", __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        rows.append(host_part(HOST_MODEL, Path(scratch)))
    for i, name in enumerate(options.models):
        rows += measure(name, options, "" if i == 0 else f" {name}")
    publish(rows, options.json)


if __name__ == "__main__":
    main()
