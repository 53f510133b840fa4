"""What the studies share: run what is not there yet, keep small tables with their manifest, redraw from them."""

import importlib
import json
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab import provenance
from conadv_lab.cli import asked
from conadv_lab.config import Config, resolved
from conadv_lab.files import write_json
from conadv_lab.launch.sweep import identity
from conadv_lab.runs import RunFolder

if TYPE_CHECKING:
    import pandas as pd

SCALES = ("smoke", "small", "full")
RESULTS = Path("analysis/results")
FIGURES = Path("docs/figures")

Figures = dict[str, Any]
Work = Callable[[Config, Path], Figures]


@dataclass(frozen=True)
class Options:
    """What every study's command takes."""

    scale: str
    out: Path
    pictures: Path
    runs: Path
    processes: int
    from_results: bool
    finished: bool
    data_dir: str = ""
    minutes: float = math.inf
    method: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The options of a study's command, as they are given."""

    scale: Literal["smoke", "small", "full"] = "small"
    """How much is run."""
    out: Path | None = None
    """Folder of table, manifest and figure."""
    runs: Path = Path("runs/studies/runs")
    """Where the run folders are."""
    processes: int = 1
    """Runs at a time, one thread each."""
    from_results: bool = False
    """Redraw from the tables, run nothing."""
    finished: bool = False
    """Take the runs that are done, leave out the others."""


@dataclass(frozen=True)
class Archived(Asked):
    data_dir: str = "data"
    """Folder of the images' archive."""


@dataclass(frozen=True)
class Mapped(Archived):
    method: tuple[str, ...] = ()
    """Further methods beside those of the scale."""
    minutes: float = math.inf
    """No run is begun after this."""


def options(
    name: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    asks: type[Asked] = Asked,
    committed: str = "full",
) -> Options:
    """The options of ``python -m analysis.NAME``, those of ``asks``.

    The committed scale writes where the committed tables and figures lie; the others below ``runs/studies``.
    """
    given = asked(asks, arguments, f"python -m analysis.{name}", description)
    shown = given.scale == committed and given.out is None
    out = given.out or (RESULTS if shown else Path("runs/studies") / given.scale)
    own = {one.name: getattr(given, one.name) for one in fields(asks)}
    return Options(**own | {"out": out, "pictures": FIGURES if shown else out})


def run_all(
    configs: Iterable[Config], given: Options, work: Work, known: str = "figures.json"
) -> dict[Config, Figures]:
    """The figures of every config, in its run folder or made now; what two studies share is run once.

    A run is known by what its config asks for, not by its folder's name: runs that ``submit sweep`` left among the
    run folders are found too. With ``given.finished`` nothing is run, and what is not there is left out.

    Args:
        work: trains at a path and gives the figures; a function that another process can import.
        known: the file of the run folder that keeps them.
    """
    runs = given.runs
    wanted = {config: identity(resolved(config)) for config in configs}
    folders = existing(runs)
    places = {
        found: folders.get(found, runs / f"{_folder_name(config)}-{found[:8]}")
        for config, found in wanted.items()
    }
    figures = {}
    todo = {}
    for config, found in wanted.items():
        if (places[found] / known).exists():
            figures[found] = json.loads((places[found] / known).read_text())
        elif not given.finished:
            todo[found] = config
    keeping = partial(_kept, work=work, known=known)
    figures |= dict(_work(todo, places, keeping, given.processes))
    return {config: figures[found] for config, found in wanted.items() if found in figures}


def existing(runs: Path) -> dict[str, Path]:
    """The run folders directly below ``runs``, by the identity of their config."""
    return {identity(RunFolder(file.parent).config()): file.parent for file in runs.glob("*/config.json")}


def commits_of(configs: Iterable[Config], runs: Path) -> str:
    """The commits that the runs of these configs were trained with, by their manifests, one after the other."""
    folders = existing(runs)
    wanted = {identity(resolved(config)) for config in configs} & folders.keys()
    return ", ".join(sorted({str(RunFolder(folders[found]).manifest()["commit"]) for found in wanted}))


def _kept(config: Config, path: Path, work: Work, known: str) -> Figures:
    """Written where it is made, so that nothing is lost where another run ends them all."""
    made = work(config, path)
    write_json(path / known, made)
    return made


def _end_with_parent() -> None:
    """Nobody would take the results of a pool whose parent was killed, and the next one waits for its folders."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(
    todo: dict[str, Config], places: dict[str, Path], work: Work, processes: int
) -> Iterator[tuple[str, Figures]]:
    from tqdm import tqdm

    bar = tqdm(total=len(todo), unit="run", mininterval=5, disable=not todo)
    if processes == 1:
        for found, config in todo.items():
            yield found, work(config, places[found])
            bar.update()
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        futures = {pool.submit(work, config, places[found]): found for found, config in todo.items()}
        for done in as_completed(futures):
            yield futures[done], done.result()
            bar.update()


def _folder_name(config: Config) -> str:
    training = config.training
    method = config.method.method.rpartition("/")[2]  # of a file its name: runs lie side by side
    return f"{method}-b{training.global_batch}-lr{config.optimization.lr:g}-s{training.seed}"


def save(name: str, out: Path, rows: "pd.DataFrame", scale: str, **facts: Any) -> None:
    """Write ``NAME.csv`` and its manifest: command, hardware, code, date, and what the study adds.

    ``facts`` may hold ``cpu_seconds``: what its runs took, wherever and whenever they ran.
    """
    from benchmarks.harness import machine

    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    manifest = {
        "command": f"python -m analysis.{name} --scale {scale}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": provenance.source()["commit"],
        "machine": machine() | {"threads": 1},  # of every run, whatever this process has
        "rows": len(rows),
        **facts,
    }
    write_json(out / f"{name}.json", manifest)


def table(name: str, folder: Path = RESULTS) -> "pd.DataFrame":
    """A study's table.

    Raises:
        ValueError: it was not measured yet.
    """
    import pandas as pd

    path = folder / f"{name}.csv"
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed with --from-results: the folder of an earlier run")
    return pd.read_csv(path)


@dataclass(frozen=True)
class Study:
    """One question: how it is measured, drawn, put into numbers, and what they were found to say.

    Attributes:
        measure: from options to the tidy rows and further facts for the manifest.
        draw: from rows to a matplotlib figure.
        numbers: from rows to the named figures that the conclusion and the documents quote.
        conclusion: three sentences with the numbers' names in braces, written for the committed table.
        claims: what the sentences say beyond the numbers, each as a test of the numbers.
        asks: the options of its command; committed: the scale of the committed table.
    """

    name: str
    question: str
    measure: Callable[[Options], tuple["pd.DataFrame", Figures]]
    draw: Callable[["pd.DataFrame"], Any]
    numbers: Callable[["pd.DataFrame"], dict[str, Any]]
    conclusion: str
    claims: dict[str, Callable[[dict[str, Any]], bool]]
    asks: type[Asked] = Asked
    committed: str = "full"

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The command; returns its exit status."""
        try:
            return self._run(arguments)
        except (ValueError, FileNotFoundError) as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            return 2

    def _run(self, arguments: Sequence[str] | None) -> int:
        given = options(self.name, self.question, arguments, asks=self.asks, committed=self.committed)
        started = time.monotonic()
        if not given.from_results:
            rows, facts = self.measure(given)
            if not given.finished:
                facts["wall_seconds"] = round(time.monotonic() - started)
            save(self.name, given.out, rows, given.scale, **facts)
        rows = table(self.name, given.out)
        picture = self.picture(rows, given.pictures)
        text = self.told(rows)
        (given.out / f"{self.name}.md").write_text(f"# {self.name}\n\n{text}\n", encoding="utf-8")
        print(f"{text}\n\n{given.out / self.name}.csv, {picture}")
        return 0

    def picture(self, rows: "pd.DataFrame", folder: Path) -> Path:
        """Draw and save the figure."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.png"
        figure = self.draw(rows)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        with Image.open(path) as drawn:  # lines and letters need few colours: a third of the bytes
            drawn.convert("RGB").quantize(96).save(path, optimize=True)
        return path

    def unsupported(self, numbers: dict[str, Any]) -> list[str]:
        """The claims of the conclusion that these numbers do not support."""
        return [claim for claim, holds in self.claims.items() if not holds(numbers)]

    def told(self, rows: "pd.DataFrame") -> str:
        """The conclusion with its numbers, or why this table does not bear it."""
        try:
            numbers = self.numbers(rows)
            failed = self.unsupported(numbers)
        except (ValueError, KeyError) as error:  # a cell, or a comparison by its name
            return f"The conclusion was written for the committed table, and this table lacks something: {error}."
        if failed:
            return (
                f"The conclusion of the committed table is not supported by this table: {'; '.join(failed)}."
            )
        return textwrap.fill(" ".join(self.conclusion.format(**numbers).split()), 120)


def studies() -> dict[str, Study]:
    """All studies by name."""
    names = (
        "flatness_vs_batch",
        "accuracy_vs_batch",
        "staleness",
        "cost",
        "critical_batch",
        "epsilon",
        "cifar_subset",
        "autowu",
        "regimes",
    )
    return {name: importlib.import_module(f"analysis.{name}").STUDY for name in names}
