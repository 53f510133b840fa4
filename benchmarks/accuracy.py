"""A recipe's accuracy and time over several seeds: ``python -m benchmarks.accuracy RECIPE [--seeds N]``.

It takes the recipe's options (``--data-dir``, ``--epochs`` …) and its own. ``--beside airbench94`` alternates with
airbench94 (Jordan 2024, arXiv 2404.00498) on the same images, if the package airbench is installed and there is a GPU.
Training seconds run from before the first step to after the last; whole seconds also include reading the data, building
the network and evaluation. Each side's first seed searches for fast convolutions, so times are compared by their
median.
"""

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, publish, write
from conadv_lab.cli import parse_config
from conadv_lab.config import Config, resolved
from conadv_lab.data.cifar import load_cifar
from conadv_lab.mistakes import require, unknown
from conadv_lab.recipes import find
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import pick_device
from conadv_lab.training.loop import prepare

PEERS = ("airbench94",)


@dataclass(frozen=True)
class Options:
    """Of this command"""

    seeds: int = 1
    """Number of seeds, starting at the config's seed."""
    beside: str | None = None
    """A peer to alternate with: airbench94."""
    out: Path | None = None
    """Folder that keeps the run folders; None: nothing is kept."""
    json: Path | None = None
    """Also write the results to this file, after each seed."""


@dataclass(frozen=True)
class Outcome:
    """One training run: its seed, named accuracies in percent, and seconds."""

    seed: int
    accuracies: Mapping[str, float]
    training: float
    whole: float


def trained(config: Config, folder: Path, resume: bool = False) -> Outcome:
    """Train a config as `conadv_lab.train` does and keep its run folder; seconds count this call only."""
    start = time.perf_counter()
    run = prepare(config, folder, resume=resume, progress="none")
    assert run is not None
    with run.claim, run.saver:
        run.start()
        begun = _now(run.parts.device)
        while run.step < run.parts.stream.steps:
            run.train_step()
        ended = _now(run.parts.device)
        run.finish()
    result = RunFolder(folder).result() or {}
    accuracies = {"test accuracy": float(result["test_accuracy"])}
    return Outcome(config.training.seed, accuracies, ended - begun, time.perf_counter() - start)


def airbench94(data_dir: Path) -> Callable[[int], Outcome]:
    """A function of the seed that trains airbench94 as its package does.

    Raises:
        ImportError: airbench, or torchvision, which it needs, is not installed.
        ValueError: there is no GPU, which it needs.
    """
    import airbench
    from airbench.lib_airbench94 import hyp

    if not torch.cuda.is_available():
        raise ValueError("airbench94 needs a GPU, which torch does not see")
    folder = tempfile.TemporaryDirectory(prefix="airbench-")
    images, labels, test_images, test_labels = load_cifar(data_dir)
    (Path(folder.name) / "cifar10").mkdir()  # the file name that its code reads
    for name, pixels, classes in (("train", images, labels), ("test", test_images, test_labels)):
        content = {"images": pixels.permute(0, 2, 3, 1).contiguous(), "labels": classes, "classes": []}
        torch.save(content, Path(folder.name) / f"cifar10/{name}.pt")

    def train(seed: int) -> Outcome:
        torch.manual_seed(seed)
        start = time.perf_counter()
        with contextlib.chdir(folder.name):
            batch = hyp["opt"]["batch_size"]
            loader = airbench.CifarLoader("cifar10", batch_size=batch, aug=hyp["aug"], altflip=True)
            begun = _now(torch.device("cuda"))
            network = airbench.train94(loader, run=seed, verbose=False)
            ended = _now(torch.device("cuda"))
            test = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
        plain = 100 * airbench.evaluate(network, test, tta_level=0)
        whole = time.perf_counter() - start
        averaged = 100 * airbench.evaluate(network, test, tta_level=2)
        names = ("test accuracy", "test accuracy with test-time augmentation")
        return Outcome(seed, dict(zip(names, (plain, averaged), strict=True)), ended - begun, whole)

    return train


def rows_of(sides: Mapping[str, Sequence[Outcome]]) -> list[Row]:
    """Each side's results, per seed and over seeds; seconds are compared with the last side's."""
    rows: list[Row] = []
    *_, peer = sides
    for side, outcomes in sides.items():
        for name in outcomes[0].accuracies if outcomes else ():
            rows += over_seeds(f"{side}, {name}", {one.seed: one.accuracies[name] for one in outcomes})
        for name in ("training", "whole") if outcomes else ():
            seconds = [getattr(one, name) for one in outcomes]
            rows += [Row(f"{side}, {name}, seed {one.seed}", getattr(one, name), "s") for one in outcomes]
            middle, beside = statistics.median(seconds), [getattr(one, name) for one in sides[peer]]
            compared = (peer, middle / statistics.median(beside)) if beside and side != peer else (None, None)
            rows.append(Row(f"{side}, {name}, median", middle, "s", *compared))
    return rows


def over_seeds(name: str, values: Mapping[int, float]) -> list[Row]:
    """Percentages per seed, their mean, and their standard deviation if there are several."""
    rows = [Row(f"{name}, seed {seed}", value, "%") for seed, value in values.items()]
    if len(values) > 1:
        rows.append(Row(f"{name}, mean of {len(values)}", statistics.mean(values.values()), "%"))
        rows.append(Row(f"{name}, standard deviation", statistics.stdev(values.values()), "points"))
    return rows


def seeds_of(config: Config, count: int) -> list[Config]:
    """The config with this many consecutive seeds."""
    require(count >= 1, "seeds", count, "a whole number of at least 1")
    return [config.replace(seed=config.training.seed + i) for i in range(count)]


def measure(recipe: str, config: Config, options: Options) -> list[Row]:
    """Rows of all seeds and sides, written out as they are measured."""
    configs = seeds_of(resolved(config), options.seeds)
    if options.beside not in (None, *PEERS):
        raise unknown("peer", options.beside, PEERS)
    sides: dict[str, list[Outcome]] = {recipe: []}
    peer = None
    if options.beside:
        try:
            peer = airbench94(Path(config.data.data_dir))
            sides[options.beside] = []
        except (ImportError, ValueError) as missing:
            print(f"{options.beside} is not measured: {missing}", file=sys.stderr, flush=True)
    torch.zeros(
        1, device=pick_device(config.training.device)
    ).item()  # the device's start-up counts for no side
    with kept_or_scratch(options.out) as folder:
        for one in configs:
            sides[recipe].append(trained(one, run_folder(folder, recipe, one)))
            if peer is not None and options.beside:
                sides[options.beside].append(peer(one.training.seed))
            if options.json:
                write(rows_of(sides), options.json)
    return rows_of(sides)


def run_folder(folder: Path, recipe: str, config: Config) -> Path:
    """The folder of a seed's run."""
    return folder / f"{recipe.rpartition(':')[2]}-s{config.training.seed}"


@contextlib.contextmanager
def kept_or_scratch(folder: Path | None) -> Any:
    """The folder given, or a temporary one."""
    made = folder or Path(tempfile.mkdtemp(prefix="runs-"))
    try:
        yield made
    finally:
        if folder is None:
            shutil.rmtree(made, ignore_errors=True)


def command(
    module: str, about: str, options: Any, words: Sequence[str] | None, measure: Callable[..., list[Row]]
) -> int:
    """``python -m module RECIPE …``: publishes what ``measure(recipe, config, options)`` returns; the exit status.

    Raises:
        SystemExit: after ``--help``, or without a recipe.
    """
    given = list(sys.argv[1:] if words is None else words)
    if not given or given[0] in ("-h", "--help"):
        print(f"{about}\n{module} RECIPE --help lists every option.")
        raise SystemExit(0 if given else 2)
    try:
        config, asked = parse_config(find(given[0]), given[1:], prog=f"{module} {given[0]}", options=options)
        rows = measure(given[0], config, asked)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    publish(rows, asked.json)
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command("benchmarks.accuracy", __doc__ or "", Options(), words, measure)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
