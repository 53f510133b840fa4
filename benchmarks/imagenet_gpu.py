"""ResNet-50 at 224 pixels on one GPU: images/s against plain loops, and the cost of a step of each method.

    python -m benchmarks.imagenet_gpu [--json FILE] [--rounds N] [--batches 4 16 256] [--methods conadv recycled]

Needs only torch and numpy; torchvision's and timm's ResNet-50 are peers if they can be imported. First, at the largest
batch, vanilla here and plain PyTorch loops, eager and compiled: bfloat16 autocast, channels-last, fused SGD. Then a
step of every method at every batch size, eager and captured, against a plain loop and one captured by hand, with the
peak memory that torch reserved and the share of the GPU's peak arithmetic rate. Images are already on the device;
`benchmarks.reading` covers loading. Results are printed and written after each batch size, so an interrupted run keeps
what it has.

It should finish within nine minutes on an H100; after ``--minutes`` no further batch size starts. docs/gpu.md has the
results. ``--device cpu --model resnet20 --pixels 8 --batches 4`` tries it without a GPU.
"""

import argparse
import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from benchmarks.captured_loop import captured_loop
from benchmarks.device_images import device_images
from benchmarks.gpu_report import STEP_GFLOP, Measured, images_per_second, peak_tflops, rows_of, tables
from benchmarks.harness import GPU_REPEATS, Row, in_words, interleaved, machine, write
from benchmarks.step import DECAY, LR, MOMENTUM, PLAIN, STEPS, WARM, plain_loop, started
from conadv_lab.config import Config, Model
from conadv_lab.data.sets import TensorSet
from conadv_lab.models.resnet import IMAGENET_MEAN, IMAGENET_STD, Normalised
from conadv_lab.training.build import pick_device
from conadv_lab.training.loop import Run

METHODS = ("vanilla", "disadv", "conadv", "recycled", "recycled-equal")
MODELS = ("resnet50", "resnet18", "resnet20")
BATCHES = (4, 8, 16, 32, 64, 128, 256)
PEERS: dict[str, Callable[[Any], nn.Module]] = {
    "torchvision": lambda package: package.models.resnet50(),
    "timm": lambda package: package.create_model("resnet50"),
}
CAPTURED = ", captured"
"""Kinds of step captured as one CUDA graph; their passes run concurrently unless named serial."""
GRAPHS = 64
"""Number of compiled versions that torch keeps per function; all methods' networks share their functions."""


class Peer(Normalised):
    """Another package's network, preceded by the normalisation that is part of ours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalise(images))


def images_on_device(config: Config) -> tuple[TensorSet, TensorSet]:
    """Training and test set of the runs."""
    data = config.data
    made = device_images(data.synthetic_images, data.synthetic_pixels, pick_device(config.training.device))
    return made, made


def config_of(method: str, batch: int, asked: argparse.Namespace, compiled: bool, **fields: Any) -> Config:
    return Config().replace(
        dataset=f"{__file__}:images_on_device",
        synthetic_images=2 * max(asked.batches),
        synthetic_pixels=asked.pixels,
        model=asked.model,
        precision="bfloat16",
        channels_last=True,
        compile=compiled,
        method=method,
        optimizer=asked.optimizer,
        lr=LR,
        momentum=MOMENTUM,
        global_batch=batch,
        steps=STEPS,
        log_every=STEPS,
        checkpoint_every=STEPS,
        device=asked.device,
        threads=torch.get_num_threads(),
        **fields,
    )


def peers(model: str) -> dict[str, Callable[[], nn.Module]]:
    """Networks of the plain loops: from torchvision and timm if they can be imported, otherwise ours."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for name, make in PEERS.items() if model == "resnet50" else ():
        try:
            package = importlib.import_module(name)
        except Exception as error:  # with a mismatched build of torch, importing them fails in many ways
            _say(f"no plain loop with {name}, which cannot be imported: {type(error).__name__}")
            continue
        found[f"plain {name}"] = lambda make=make, package=package: Peer(make(package))  # type: ignore[misc]
    return found or {f"plain {model} of this package": lambda: PLAIN[model](1000)}  # type: ignore[call-arg]


def rates(asked: argparse.Namespace, folder: Path) -> list[Row]:
    """Images per second of our vanilla and of the plain loops, timed in turn."""
    batch, device = max(asked.batches), pick_device(asked.device)
    forms = {"": False, ", compiled": True} if asked.compile else {"": False}
    calls: dict[str, Callable[[], None]] = {}
    for ending, compiled in forms.items():
        config = config_of("vanilla", batch, asked, compiled)
        run = started(config, folder / f"rate-{compiled}")
        calls[f"vanilla{ending}"] = run.train_step
        data = images_on_device(config)[0]
        for name, make in peers(asked.model).items():
            network = make().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if compiled:
                network = torch.compile(network)
            calls[f"{name}{ending}"] = plain_loop(network, batch, data.images, data.labels, bfloat16=True)
    for name, call in calls.items():
        _say(f"{name}, {batch} images")
        for _ in range(WARM):
            call()
    times = interleaved(calls, asked.rounds, cuda=device.type == "cuda", repeats=asked.repeats)
    return images_per_second(times, batch, own=[f"vanilla{ending}" for ending in forms])


def kinds(asked: argparse.Namespace, on_gpu: bool) -> dict[str, dict[str, Any]]:
    """From the label of each kind of step to its config's fields; vanilla is always first."""
    methods = ["vanilla", *(m for m in METHODS if m in asked.methods and m != "vanilla")]
    chosen: dict[str, dict[str, Any]] = {m: {"method": m, "capture": "off"} for m in methods}
    # CUDA graphs captured by torch.compile and by us do not mix in one process.
    if on_gpu and asked.compile_steps in (None, "default"):
        beside = {"capture": "on", "placement": "stream"}
        chosen |= {f"{m}{CAPTURED}": {"method": m, **beside} for m in methods}
        chosen |= {
            f"{m}{CAPTURED}, serial": {"method": m, "capture": "on"} for m in methods if m != "vanilla"
        }
    return chosen


def steps_at(batch: int, asked: argparse.Namespace, folder: Path) -> list[Measured]:
    """Every kind of step at one batch size, timed in turn; what does not fit into memory is reported and left out."""
    device = pick_device(asked.device)
    torch.compiler.reset()  # another batch size means other shapes
    runs: dict[str, Run] = {}
    memory: dict[str, float | None] = {}
    for label, fields in kinds(asked, device.type == "cuda").items():
        fields = dict(fields)
        fields["compile_mode"] = asked.compile_steps or "default"
        config = config_of(fields.pop("method"), batch, asked, bool(asked.compile_steps), **fields)
        try:
            run, reserved = warmed(config, folder / f"{batch} {label}")
        except torch.OutOfMemoryError:
            _say(f"{label} at {batch} images: not measured, as it does not fit into memory")
            continue
        except ValueError as error:  # a step that must be captured but cannot be
            _say(f"{label} at {batch} images: not measured, as {error}")
            continue
        runs[label], memory[label] = run, reserved
    if "vanilla" not in runs:
        return []
    calls: dict[str, Callable[[], None]] = {label: run.train_step for label, run in runs.items()}
    calls |= plain_loops(batch, asked, device)
    times = interleaved(calls, asked.rounds, cuda=device.type == "cuda", repeats=asked.repeats)
    evaluations = {label: run.parts.method.gradient_evaluations for label, run in runs.items()}
    peak = peak_tflops() if device.type == "cuda" else None
    gflop = STEP_GFLOP.get((asked.model, asked.pixels))
    return [
        Measured.of(label, batch, times, memory.get(label), evaluations.get(label, 1.0), gflop, peak)
        for label in calls
    ]


def plain_loops(batch: int, asked: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """Vanilla steps without this package: a plain loop, and one captured by hand."""
    data = images_on_device(config_of("vanilla", batch, asked, False))[0]

    def network() -> nn.Module:
        made = next(iter(peers(asked.model).values()))()
        return made.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    loops = {"plain loop": plain_loop(network(), batch, data.images, data.labels, bfloat16=True)}
    if device.type == "cuda":
        loops["plain loop" + CAPTURED] = captured_loop(
            network(), batch, data.images, data.labels, LR, MOMENTUM, DECAY, STEPS
        )
    for loop in loops.values():
        loop()
    return loops


def warmed(config: Config, folder: Path) -> tuple[Run, float | None]:
    """A run past its first steps, and the peak memory that torch reserved for it on the GPU, in GiB."""
    before = _reserved(config)
    run = started(config, folder)
    for number in range(WARM):
        if before is not None and number == WARM - 2:
            _forget_peak()  # benchmarking of convolution algorithms, which the first kind at a batch size does for all
        run.train_step()
    if before is None:
        return run, None
    torch.cuda.synchronize()
    return run, (torch.cuda.max_memory_reserved() - before) / 2**30


def _reserved(config: Config) -> int | None:
    if pick_device(config.training.device).type != "cuda":
        return None
    images_on_device(config)
    _forget_peak()
    return torch.cuda.memory_reserved()


def _forget_peak() -> None:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(asked: argparse.Namespace) -> list[Row]:
    """All rows; writes them and prints the tables as it goes."""
    begun, rows = time.monotonic(), []
    torch._dynamo.config.recompile_limit = GRAPHS
    print(in_words(machine()))
    with tempfile.TemporaryDirectory() as scratch:
        if asked.rates:
            rows += rates(asked, Path(scratch))
            width = max(len(row.name) for row in rows)
            for row in rows:
                print(
                    f"{row.name:<{width}} {row.value:>9.1f} {row.unit}   {row.ratio:.3f} × {row.peer}",
                    flush=True,
                )
            _keep(rows, asked)
        steps: list[Measured] = []
        longest = 0.0
        for batch in asked.batches:
            start = time.monotonic()
            if start - begun + longest > 60 * asked.minutes:
                _say(f"{batch} images: not measured, as {asked.minutes:g} minutes would be over")
                continue
            _say(f"steps of {batch} images")
            try:
                found = steps_at(batch, asked, Path(scratch))
            except torch.OutOfMemoryError:
                _say(f"{batch} images: not measured, as all kinds together do not fit into memory")
            else:
                steps += found
                print(tables(found), flush=True)
                _keep(rows + rows_of(steps), asked)
            longest = max(longest, time.monotonic() - start)
    print(tables(steps))
    return rows + rows_of(steps)


def main(words: Iterable[str] | None = None) -> None:
    # argparse, unlike all other commands, because this one needs only torch and numpy.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="images a step")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--pixels", type=int, default=224, help="height and width (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd", help="of the methods here")
    parser.add_argument(
        "--repeats", type=int, default=GPU_REPEATS, help="steps per timing (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-rates", dest="rates", action="store_false", help="without the plain loops")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager plain loops only")
    parser.add_argument(
        "--compile-steps",
        nargs="?",
        const="default",
        choices=get_args(get_type_hints(Model)["compile_mode"]),
        help="compile the methods' networks too, in this mode of torch.compile's (default: default); a mode of CUDA "
        "graphs is without the kinds whose attack is captured in one",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start nothing after this many minutes (default: 8)"
    )
    asked = parser.parse_args(None if words is None else list(words))
    if asked.threads:
        torch.set_num_threads(asked.threads)
    _keep(measure(asked), asked)


def _keep(rows: list[Row], asked: argparse.Namespace) -> None:
    if asked.json is not None:
        write(rows, asked.json)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
