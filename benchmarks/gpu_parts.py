"""The parts of a GPU visit, most important first; to add one, add an entry to `PARTS`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
FAST, RESNET = "cifar10-fast", "cifar10-resnet18-512"
"""Recipes of the parts."""
SMALL = (
    "--dataset {root}/benchmarks/truncated_cifar.py:sets --threads 1 --bn-recalibrate 64 --model resnet20 "
    "--precision float32 --epochs 1 --global-batch 64 --warmup-epochs 0 --base-lr 0.05"
)
"""Options that make a recipe finish within a second or two on a CPU."""
SMALL_STEPS = "--model resnet20 --pixels 8 --batches 4 --rounds 2 --repeats 1 --methods conadv --threads 1"

Need = Literal["cifar10", "run"]


@dataclass(frozen=True)
class Place:
    """The folders of a visit.

    Attributes:
        out: folder of gpu.json and gpu.md.
        scratch: one folder per part for its output, including run folders with large checkpoints.
        data: folder with CIFAR-10, or None.
        small: whether to make every part tiny, to try it on a CPU.
    """

    out: Path
    scratch: Path
    data: Path | None
    small: bool

    def run(self) -> Path | None:
        """A finished run that an earlier part left."""
        return next((file.parent for file in sorted(self.scratch.glob("*/runs/*/result.json"))), None)


@dataclass(frozen=True)
class Part:
    """One measurement, run in a separate process.

    Attributes:
        name: the value for ``--only``.
        about: what it measures, in one line.
        words: Python's command line. {figures} is the JSON file to write, {runs} a folder for runs, {data} the folder
            with CIFAR-10, {run} a finished run, {root} the repository, {scratch} the folder of all parts' runs.
        seconds: time limit, after which it is killed.
        least: seconds that must be left for it to start.
        needs: its requirements.
        small: further arguments that make it tiny.
        shown: what the page shows: its rows, or its output.
    """

    name: str
    about: str
    words: str
    seconds: float
    least: float = 30.0
    needs: tuple[Need, ...] = ()
    small: str = ""
    shown: Literal["rows", "output"] = "rows"

    def command(self, place: Place) -> list[str]:
        known = {
            "figures": place.scratch / self.name / "figures.json",
            "runs": place.scratch / self.name / "runs",
            "scratch": place.scratch,
            "data": place.data,
            "run": place.run(),
            "root": ROOT,
        }
        return [sys.executable, *(word.format(**known) for word in shlex.split(self._all_words(place.small)))]

    def told(self, small: bool) -> str:
        """The command, without paths of this machine."""
        names = ("figures", "runs", "scratch", "data", "run", "root")
        return f"python {self._all_words(small)}".format(**{name: name.upper() for name in names})

    def _all_words(self, small: bool) -> str:
        return f"{self.words} {self.small}" if small else self.words


PARTS = (
    Part(
        "cifar",
        f"recipe {FAST}, three seeds, beside airbench94 where it can be imported",
        f"-m benchmarks.accuracy {FAST} --data-dir {{data}} --seeds 3 --beside airbench94 --out {{runs}} "
        "--json {figures}",
        seconds=180,
        least=60,
        needs=("cifar10",),
        small=f"{SMALL} --seeds 2 --bias-lr-factor 1",
    ),
    Part(
        "tests",
        "the tests that need a CUDA device",
        "-m benchmarks.gpu_tests --json {figures}",
        seconds=180,
        small="--files tests/data/test_hashing.py",
    ),
    Part(
        "resnet18",
        f"recipe {RESNET}, one seed",
        f"-m benchmarks.accuracy {RESNET} --data-dir {{data}} --out {{runs}} --json {{figures}}",
        seconds=120,
        needs=("cifar10",),
        small=SMALL,
    ),
    Part(
        "control",
        f"a plain PyTorch loop beside recipe {RESNET}",
        f"-m benchmarks.control {RESNET} --data-dir {{data}} --out {{scratch}}/resnet18/runs --json {{figures}}",
        seconds=150,
        needs=("cifar10",),
        small=SMALL,
    ),
    Part(
        "sharpness",
        "curvature and sharpness of a trained run, beside PyHessian on the same batches",
        "-m conadv_lab.sharpness {run} --cross-check --json {figures}",
        seconds=120,
        needs=("run",),
        small="--trust --examples 8 --batch-size 8 --measures trace",
        shown="output",
    ),
    Part(
        "sharpness-peers",
        "the sharpness benchmark: ours beside PyHessian, to the same true error",
        "-m benchmarks.sharpness --subject resnet18 --device cuda --data-dir {data} --json {figures}",
        seconds=120,
        needs=("cifar10",),
        small="--subject resnet20 --device cpu --rounds 2 --threads 1 --examples 8 --epochs 2 --peer-seconds 1",
    ),
    Part(
        "imagenet",
        "a training step of every method, ResNet-50 at 224 pixels, eager and captured",
        "-m benchmarks.imagenet_gpu --no-compile --batches 4 64 256 --rounds 5 --minutes 1.2 --json {figures}",
        seconds=100,
        small=f"{SMALL_STEPS} --device cpu",
        shown="output",
    ),
    Part(
        "lars",
        "a LARS step on ResNet-50's parameters",
        "-m benchmarks.lars --json {figures}",
        seconds=60,
        least=20,
        small="--rounds 2",
    ),
    Part(
        "imagenet-compiled",
        "the same step of every method, compiled",
        "-m benchmarks.imagenet_gpu --compile-steps --no-rates --batches 64 4 --rounds 5 --minutes 2 --json {figures}",
        seconds=200,
        least=60,
        small=f"{SMALL_STEPS} --device cpu",
        shown="output",
    ),
)
