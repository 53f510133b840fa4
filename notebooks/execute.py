"""Execute the notebooks and put the copies with their figures beside them: python -m notebooks.execute [NAME …]

Each ``NAME.py`` (jupytext, percent format) becomes ``NAME.ipynb``. ``--fast`` executes in the tests' short mode and
writes nothing.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from conadv_lab.cli import asked

FOLDER = Path(__file__).resolve().parent
LARGEST_PICTURE = 100_000
"""Bytes of one figure in an executed copy."""


def sources() -> list[Path]:
    """The notebooks as Python, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def executed(source: Path, fast: bool) -> Any:
    """The notebook of a Python file, executed in its own folder by this interpreter.

    Raises:
        CellExecutionError: a cell failed.
    """
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    before = dict(os.environ)
    os.environ |= {
        "CONADV_LAB_FAST": "1" if fast else "0",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), before.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    try:
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
        ).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return notebook


def slim(notebook: Any) -> Any:
    """Without what differs from one execution to the next: times, ids, versions of the kernel."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


@dataclass(frozen=True)
class Options:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Such as 01_first_run; none: all."""
    fast: bool = False
    """The tests' short mode; nothing is written."""


def main(arguments: list[str] | None = None) -> int:
    given = asked(Options, arguments, "python -m notebooks.execute", __doc__)
    import nbformat

    for source in sources():
        if given.names and source.stem not in given.names:
            continue
        notebook = slim(executed(source, given.fast))
        if not given.fast:
            nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.stem, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
