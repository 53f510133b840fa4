"""What an adapter costs: the method `vanilla` inside Lightning, the Trainer and Accelerate, against their plain step.

    python -m benchmarks.adapters [--json FILE] [--rounds N] [--batch N] [--threads N] [--no-keep]

ResNet-20 on synthetic images of 32 × 32, SGD with momentum. Each library trains twice, on the same images from the same
kind of loader: once without this package, and once through the adapter. A trainer owns its loop, so each runs in
a thread that waits after every step; one step of each is timed in turn, in CPU time of the process. Needs the extra
[adapters].

By default glibc returns freed memory to the system, and touching it again costs up to a tenth of a step. How much
depends on which tensor lies last in the heap, not on the adapter: Lightning's automatic optimisation holds the old
gradients during the forward pass, and its manual optimisation, which the adapter uses, does not. So freed memory is
kept here, for all loops alike; --no-keep measures with glibc's default.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Options, Row, interleaved, publish
from conadv_lab import extras
from conadv_lab.cli import asked
from conadv_lab.integrations.accelerate import look_ahead
from conadv_lab.integrations.huggingface import TrainerMethod
from conadv_lab.integrations.lightning import LightningMethod
from conadv_lab.methods.base import Vanilla
from conadv_lab.models.resnet import resnet20
from conadv_lab.training.process import keep_freed_memory

BATCH, IMAGES = 128, 2_048
WARM = 3
"""Steps before any timing."""
Wait = Callable[[], None]


class Stepped:
    """Takes one step per call of a loop that a library owns: it runs in a thread and waits after each step.

    Args:
        loop: trains until stopped; calls its argument after each step.
    """

    def __init__(self, loop: Callable[[Wait], None]) -> None:
        self._loop, self._ends = loop, False
        self._error: Exception | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        self._ends = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._ends:
                self._loop(self._wait)
        except _End:
            return
        except Exception as error:
            self._error = error
        self._done.release()

    def _wait(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._ends:
            raise _End


class _End(BaseException):
    """Raised to leave a trainer's loop; no trainer catches it."""


class Network(nn.Module):
    """ResNet-20 with the call signature of Hugging Face models."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet20()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = {"logits": self.network(pixel_values)}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(outputs["logits"], labels)
        return outputs


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 32, 32, generator=draw)
    return TensorDataset(images, torch.randint(0, 10, (IMAGES,), generator=draw))


def loader(batch: int) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch, shuffle=True, drop_last=True)


def lightning_loop(through: bool, batch: int, folder: Path) -> Callable[[Wait], None]:
    lightning: Any = extras.load("lightning.pytorch", "adapters", "benchmarks.adapters")

    class Plain(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = resnet20()

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    class Own(Plain):
        def training_step(self, parts: tuple[Tensor, Tensor], _number: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(parts[0]), parts[1])
            self.log("loss", loss, batch_size=len(parts[1]))
            return loss

    class Ours(LightningMethod, Plain):
        def __init__(self) -> None:
            super().__init__(Vanilla(), nn.CrossEntropyLoss())

    def loop(wait: Wait) -> None:
        class Waits(lightning.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                wait()

        trainer = lightning.Trainer(
            max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=[Waits()],
        )  # fmt: skip
        module: Any = Ours() if through else Own()
        trainer.fit(module, module.look_ahead(loader(batch)) if through else loader(batch))

    return loop


def trainer_loop(through: bool, batch: int, folder: Path) -> Callable[[Wait], None]:
    transformers: Any = extras.load("transformers", "adapters", "benchmarks.adapters")

    class Ours(TrainerMethod, transformers.Trainer):
        pass

    def loop(wait: Wait) -> None:
        class Waits(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                wait()

        model = Network()
        optimizer = sgd(model)
        settings = transformers.TrainingArguments(
            str(folder), max_steps=1_000_000, per_device_train_batch_size=batch, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            dataloader_drop_last=True, dataloader_pin_memory=False,
        )  # fmt: skip
        pairs = zip(*data().tensors, strict=True)
        given = {
            "model": model, "args": settings, "callbacks": [Waits()],
            "train_dataset": [{"pixel_values": image, "labels": label} for image, label in pairs],
            "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        }  # fmt: skip
        trainer = Ours(method=Vanilla(), **given) if through else transformers.Trainer(**given)
        trainer.train()

    return loop


def accelerate_loop(through: bool, batch: int, _folder: Path) -> Callable[[Wait], None]:
    accelerate: Any = extras.load("accelerate", "adapters", "benchmarks.adapters")

    def loop(wait: Wait) -> None:
        accelerator, criterion, model = accelerate.Accelerator(cpu=True), nn.CrossEntropyLoss(), resnet20()
        model, optimizer, batches = accelerator.prepare(model, sgd(model), loader(batch))
        method = Vanilla()
        ahead = look_ahead(accelerator, batches, method) if through else None
        for parts in _epochs(batches if ahead is None else ahead):
            if ahead is None:
                accelerator.backward(criterion(model(parts[0]), parts[1]))
            else:
                method.backward(model, parts, criterion)
            optimizer.step()
            optimizer.zero_grad()
            if ahead is not None:
                ahead.done(parts)
            wait()

    return loop


def _epochs(batches: Any) -> Iterator[Any]:
    for _ in count():
        yield from batches


LOOPS = {"Lightning": lightning_loop, "Trainer": trainer_loop, "Accelerate": accelerate_loop}


def measure(batch: int, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        loops = {
            name if through else f"plain {name}": Stepped(make(through, batch, Path(scratch)))
            for name, make in LOOPS.items()
            for through in (False, True)
        }
        try:
            for _ in range(WARM):
                for step in loops.values():
                    step()
            times = interleaved(loops, rounds, clock=time.process_time)
        finally:
            for step in loops.values():
                step.end()
    return [times.row(name, f"plain {name}") for name in LOOPS]


@dataclass(frozen=True)
class AdapterOptions(Options):
    rounds: int = 31
    batch: int = BATCH
    """Images per step."""
    threads: int | None = None
    """CPU threads; None: all cores."""
    keep: bool = True
    """Keep freed memory, where the C library is glibc."""


def main() -> None:
    options = asked(AdapterOptions, None, "benchmarks.adapters", __doc__)
    if options.keep:
        keep_freed_memory(-1)
    if options.threads:
        torch.set_num_threads(options.threads)
    publish(measure(options.batch, options.rounds), options.json)


if __name__ == "__main__":
    main()
