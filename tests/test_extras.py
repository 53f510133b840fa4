"""Optional packages: each belongs to an extra, none is needed by the rest, and a missing one is one sentence."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from conadv_lab import extras

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "conadv_lab").rglob("*.py"))
CORE = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Import names of core dependencies that differ from the distribution's."""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def core_packages() -> set[str]:
    from packaging.requirements import Requirement

    names = {Requirement(text).name.replace("-", "_") for text in project()["dependencies"]}
    return names | CORE.keys()


def unconditional(body: list[ast.stmt]) -> list[str]:
    """Packages that the statements of a module import whenever it is imported; one in a ``try`` may be missing."""
    found = []
    for statement in body:
        if isinstance(statement, ast.Import):
            found += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            found.append(statement.module or "")
    return [name.partition(".")[0] for name in found]


def test_importing_a_module_needs_core_packages_only():
    allowed = core_packages() | set(sys.stdlib_module_names) | {"conadv_lab"}
    imported = {path.name: set(unconditional(ast.parse(path.read_text()).body)) for path in MODULES}
    assert {name: more for name, found in imported.items() if (more := found - allowed)} == {}


def test_extras_that_the_code_names_are_there():
    calls = [
        node
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "extras.load"
    ]
    assert calls
    named = {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    assert named <= project()["optional-dependencies"].keys()


def test_all_is_every_extra_but_the_developers():
    optional = project()["optional-dependencies"]
    (everything,) = optional["all"]
    assert set(everything.removeprefix("conadv-lab[").removesuffix("]").split(",")) == optional.keys() - {
        "all",
        "dev",
    }


def test_a_broken_package_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator nms does not exist\\nmore')")
    (tmp_path / "needs_another.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"cannot be imported \(RuntimeError: operator nms does not exist\): pip"
    ):
        extras.load("broken_package", "vision", "model timm:x")
    with pytest.raises(ValueError, match=r"cannot be imported \(ModuleNotFoundError: .*not_there_at_all"):
        extras.load("needs_another", "vision", "model timm:x")


def test_the_package_of_a_missing_parent_is_missing():
    message = r"^reader 'x' needs no_such\.part, which is not installed: pip install 'conadv-lab\[dali\]'$"
    with pytest.raises(ValueError, match=message):
        extras.load("no_such.part", "dali", "reader 'x'")
