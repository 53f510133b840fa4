"""Install the optional packages into fresh environments, and check that each works alone and leaves torch as it was.

    python -m tests.fresh [--only NAME …]

An environment with the same torch and this package is made once and copied, by hard links, for each library of the
extra ``adapters`` and for each whole extra. What is installed comes from pip's own configuration and constraints.txt.
The example on a library's page in docs/ runs where none of the other libraries is installed. DALI, which needs
a GPU and a large download, is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.integrations import examples

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
WHOLE = ("fast", "optim", "notebooks", "docs", "vision", "adapters")
TORCH = (
    "import torch, json; print(json.dumps([torch.__version__, torch.version.git_version, torch.__file__]))"
)


def command(words: list[str], folder: Path) -> str:
    """Standard output; a failure raises with what was printed."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


class Environment:
    """A virtual environment in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, str(folder / "bin" / "python")

    def run(self, code: str) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            return command([self.python, "-c", code], Path(scratch))

    def install(self, *words: str) -> None:
        pip = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        command([self.python, *pip, *words], ROOT)

    def copy(self, folder: Path) -> "Environment":
        """pip replaces files and changes none in place, so hard links suffice."""
        command(["cp", "-al", str(self.folder), str(folder)], ROOT)
        return Environment(folder)


def base(folder: Path) -> Environment:
    command([sys.executable, "-m", "venv", str(folder)], ROOT)
    made = Environment(folder)
    made.install(f"torch=={torch.__version__}")
    made.install(".")
    return made


def requirements() -> Iterator[tuple[str, str, str | None]]:
    """Name, what pip is to install, and the library whose example then runs."""
    for library in EXTRAS["adapters"]:
        name = library.partition(">=")[0]
        also = " accelerate" if name == "transformers" else ""  # as its Trainer says itself
        yield name, library + also, name if name in examples.PAGES else None
    for extra in WHOLE:
        yield f"[{extra}]", f".[{extra}]", None


def check(environment: Environment, before: list[str], requirement: str, library: str | None) -> None:
    environment.install(*requirement.split())
    after = environment.run(TORCH)
    if json.loads(after)[:2] != before[:2]:
        raise RuntimeError(f"torch was {before[:2]} and is {after}")
    environment.run("import conadv_lab, conadv_lab.training.loop, conadv_lab.sharpness.measures.front")
    command([environment.python, "-m", "conadv_lab.train", "--list"], environment.folder)
    if library:
        environment.run(examples.of(library))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names, such as lightning or [docs]; all by default")
    only = parser.parse_args().only
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        first = base(Path(scratch) / "base")
        before = json.loads(first.run(TORCH))
        print(f"torch {before[0]}, fresh in {time.monotonic() - start:.0f} s", flush=True)
        for number, (name, requirement, library) in enumerate(requirements()):
            if only and name not in only:
                continue
            start = time.monotonic()
            try:
                check(first.copy(Path(scratch) / str(number)), before, requirement, library)
                ran = ", its example ran" if library else ""
                print(f"{name}: torch unchanged{ran}, {time.monotonic() - start:.0f} s", flush=True)
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
