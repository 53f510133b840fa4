"""Finds the user's own modules that a user's file imports, without running it."""

import ast
import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

SUFFIXES = {".py", ".html", ".csv", ".toml", ".typed"}
"""Suffixes of the files that are copied with a package."""


def with_own_modules(path: Path, start: Path) -> dict[str, Path]:
    """The file and its direct and indirect imports from its own folder or ``start``: relative path to source.

    A package is taken whole. Imports by a computed name, as with ``importlib``, are not found. Installed packages and
    what is on PYTHONPATH are left out: the environment provides them on the cluster too.
    """
    importlib.invalidate_caches()
    folders = [path.parent.resolve(), start.resolve()]
    found = {path.name: path}
    waiting = [path]
    while waiting:
        for name in _imported(waiting.pop()):
            for relative, source in _own_files(name, folders).items():
                if relative not in found:
                    found[relative] = source
                    waiting += [source] if source.suffix == ".py" else []
    return found


def sources(folder: Path) -> list[Path]:
    """The files below a folder to copy with it."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in SUFFIXES and "__pycache__" not in file.parts
    ]


def _imported(file: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it; a file that is not valid Python imports nothing."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # running the file reports it
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - {"conadv_lab"}


def _own_files(name: str, folders: list[Path]) -> dict[str, Path]:
    """The files of a module that Python would find directly in one of the folders; none for other modules."""
    spec = PathFinder.find_spec(name, [*map(str, folders), *sys.path])
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        file = Path(spec.origin or "")
        return {file.name: file} if file.suffix == ".py" and file.parent in folders else {}
    roots = [root for root in map(Path, spec.submodule_search_locations) if root.parent in folders]
    files = {f"{name}/{file.relative_to(root)}": file for root in roots for file in sources(root)}
    # Without requiring __init__.py any folder would count as a package, a data folder too.
    return files if any(relative.endswith(".py") for relative in files) else {}
