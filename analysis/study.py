"""What the studies share: run what is missing, keep small tables with a manifest, redraw figures from them."""

import importlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab import provenance
from conadv_lab.cli import asked
from conadv_lab.config import Config, resolved
from conadv_lab.files import write_json
from conadv_lab.launch.sweep import identity
from conadv_lab.pool import worked
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
    """The options of every study's command."""

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
    """Values of a study command's options."""

    scale: Literal["smoke", "small", "full"] = "small"
    """The size of the study."""
    out: Path | None = None
    """Folder of table, manifest and figure."""
    runs: Path = Path("runs/studies/runs")
    """Parent of the run folders."""
    processes: int = 1
    """Number of runs at a time, one thread each."""
    from_results: bool = False
    """Redraw from the tables without running anything."""
    finished: bool = False
    """Use only finished runs."""


@dataclass(frozen=True)
class Archived(Asked):
    data_dir: str = "data"
    """Folder of the data set's archive."""


@dataclass(frozen=True)
class Mapped(Archived):
    method: tuple[str, ...] = ()
    """Further methods to add to the scale's."""
    minutes: float = math.inf
    """Start no run after this many minutes."""


def options(
    name: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    asks: type[Asked] = Asked,
    committed: str = "full",
) -> Options:
    """Options of ``python -m analysis.NAME``, as the dataclass ``asks``.

    The committed scale overwrites the committed tables and figures; the others write below ``runs/studies``.
    """
    given = asked(asks, arguments, f"python -m analysis.{name}", description)
    shown = given.scale == committed and given.out is None
    out = given.out or (RESULTS if shown else Path("runs/studies") / given.scale)
    own = {one.name: getattr(given, one.name) for one in fields(asks)}
    return Options(**own | {"out": out, "pictures": FIGURES if shown else out})


def run_all(
    configs: Iterable[Config], given: Options, work: Work, known: str = "figures.json"
) -> dict[Config, Figures]:
    """The results of every config, from its run folder or computed now; runs shared by two studies run once.

    A run is identified by its config, not by its folder's name, so runs that ``submit sweep`` left among the run
    folders are found too. With ``given.finished`` nothing is run, and missing runs are left out.

    Args:
        work: trains at a path and returns the results; must be importable by another process.
        known: the file of the run folder that keeps them.
    """
    from tqdm import tqdm

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
            todo[places[found]] = config
    keeping = partial(_kept, work=work, known=known)
    done = worked(keeping, todo, given.processes)
    by_path = dict(tqdm(done, total=len(todo), unit="run", mininterval=5, disable=not todo))
    figures |= {found: by_path[place] for found, place in places.items() if place in by_path}
    return {config: figures[found] for config, found in wanted.items() if found in figures}


def existing(runs: Path) -> dict[str, Path]:
    """The run folders directly below ``runs``, by the identity of their config."""
    return {identity(RunFolder(file.parent).config()): file.parent for file in runs.glob("*/config.json")}


def commits_of(configs: Iterable[Config], runs: Path) -> str:
    """The commits that these configs' runs were trained with, from their manifests."""
    folders = existing(runs)
    wanted = {identity(resolved(config)) for config in configs} & folders.keys()
    return ", ".join(sorted({str(RunFolder(folders[found]).manifest()["commit"]) for found in wanted}))


def _kept(config: Config, path: Path, work: Work, known: str) -> Figures:
    """Compute and write the results in one process, so that nothing is lost if another run fails."""
    made = work(config, path)
    write_json(path / known, made)
    return made


def _folder_name(config: Config) -> str:
    training = config.training
    method = config.method.method.rpartition("/")[2]  # of a file its name: runs lie side by side
    return f"{method}-b{training.global_batch}-lr{config.optimization.lr:g}-s{training.seed}"


def save(name: str, out: Path, rows: "pd.DataFrame", scale: str, **facts: Any) -> None:
    """Write ``NAME.csv`` and its manifest: command, hardware, commit, date, and what the study adds.

    ``facts`` may hold ``cpu_seconds``: the total of its runs, wherever and whenever they ran.
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
        ValueError: it has not been measured yet.
    """
    import pandas as pd

    path = folder / f"{name}.csv"
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed with --from-results: the folder of an earlier run")
    return pd.read_csv(path)


@dataclass(frozen=True)
class Study:
    """One question: how it is measured and drawn, the numbers it yields, and its conclusion.

    Attributes:
        measure: from options to tidy rows and further facts for the manifest.
        draw: from rows to a matplotlib figure.
        numbers: from rows to the named numbers that the conclusion and the documents quote.
        conclusion: three sentences with the numbers' names in braces, written for the committed table.
        claims: the qualitative statements of the conclusion, each as a test of the numbers.
        asks: the dataclass of its command's options; committed: the scale of the committed table.
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
        """Run the study's command; returns its exit status."""
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
        with Image.open(path) as drawn:  # line art needs few colours: a third of the bytes
            drawn.convert("RGB").quantize(96).save(path, optimize=True)
        return path

    def unsupported(self, numbers: dict[str, Any]) -> list[str]:
        """The conclusion's claims that these numbers do not support."""
        return [claim for claim, holds in self.claims.items() if not holds(numbers)]

    def told(self, rows: "pd.DataFrame") -> str:
        """The conclusion with its numbers, or why this table does not support it."""
        try:
            numbers = self.numbers(rows)
            failed = self.unsupported(numbers)
        except (ValueError, KeyError) as error:  # the name of a missing cell or comparison
            return (
                f"The conclusion was written for the committed table; this table lacks data for it: {error}."
            )
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
        "neighbours",
        "regimes",
        "regime_attempts",
        "regime_causes",
    )
    return {name: importlib.import_module(f"analysis.{name}").STUDY for name in names}
