"""The rooms import downwards only, and no modules import one another in a circle, wherever the import stands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("__main__", "train", "submit", "demo", "demo_report"),
    ("launch",),
    ("integrations",),
    ("plan",),
    ("staleness.__main__",),
    ("staleness.report",),
    ("staleness.dynamics",),
    ("staleness.theory", "staleness.timeline"),
    ("staleness",),
    ("footprint",),
    ("sharpness.__main__",),
    ("sharpness.subject",),
    ("training",),
    ("sharpness.report",),
    ("sharpness.measures",),
    ("sharpness.spectrum",),
    ("sharpness.operators",),
    ("sharpness.problem",),
    ("sharpness",),
    ("data.pack",),
    ("cli", "outputs", "plots", "recipes", "runs", "frames"),
    ("config",),
    ("capture",),
    ("methods",),
    ("data", "models", "optim"),
    (
        "cores",
        "criteria",
        "checkpoints",
        "extras",
        "files",
        "intervals",
        "mistakes",
        "outside",
        "pages",
        "displays",
        "pipes",
        "pool",
        "provenance",
        "reading",
        "references",
        "registry",
        "seeds",
    ),
)
"""A room may import those of its own line and below; ``room.part`` is of another line than the rest of its room.

What is imported for types alone does not count: nothing of it runs.
"""


def modules() -> dict[str, Path]:
    """Every module of the package by its name after ``conadv_lab.``; a room by its own."""
    found = {}
    for file in sorted((ROOT / "conadv_lab").rglob("*.py")):
        parts = file.relative_to(ROOT / "conadv_lab").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports of the package, also within functions."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING":
            continue
        if isinstance(part, ast.ImportFrom) and (part.module or "").split(".")[0] == "conadv_lab":
            room = (part.module or "").partition(".")[2]
            for alias in part.names:
                name = f"{room}.{alias.name}".strip(".")
                yield name if name in known else room
        elif isinstance(part, ast.Import):
            yield from (a.name.partition(".")[2] for a in part.names if a.name.startswith("conadv_lab."))
        yield from imported(part, known)


def floor_of(name: str) -> int | None:
    """The number of a module's line in `FLOORS`; the package itself stands above everything."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        wanted = ".".join(parts[:length])
        for number, line in enumerate(FLOORS):
            if wanted in line:
                return number
    return None


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    trees = {name: ast.parse(file.read_text()) for name, file in known.items() if name}
    return {
        name: {to for to in imported(tree, known) if to not in ("", name)} for name, tree in trees.items()
    }


def test_every_module_has_a_floor(imports):
    assert [name for name in imports if floor_of(name) is None] == []


def test_rooms_import_downwards_only(imports):
    upwards = [
        f"{name} imports {to}" for name, wanted in imports.items() for to in sorted(wanted)
        if (floor_of(to) or 0) < (floor_of(name) or 0)
    ]  # fmt: skip
    assert upwards == []


def test_no_modules_import_one_another_in_a_circle(imports):
    assert circles(imports) == []


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules of which each reaches each other one through imports."""
    reached = {name: {name} for name in imports}
    for _ in imports:
        before = sum(map(len, reached.values()))
        for name, wanted in imports.items():
            reached[name] |= set().union(*(reached.get(to, set()) for to in wanted))
        if sum(map(len, reached.values())) == before:
            break
    found: list[set[str]] = []
    for name, others in reached.items():
        circle = {other for other in others if name in reached[other]}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def test_the_files_to_read_for_one_step_exist_and_are_eight():
    text = (ROOT / "docs/architecture.md").read_text()
    (told,) = re.findall(r"To follow one step, read eight files: (.*?)\. For a method", text, re.DOTALL)
    files = [ROOT / "conadv_lab" / name for name in re.findall(r"`([a-z_/]+)`", told)]
    assert len(files) == 8
    assert [file for file in files if not file.is_dir() and not file.with_suffix(".py").exists()] == []


def test_a_circle_and_an_upward_import_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert (
        floor_of("staleness.timeline.cluster") > floor_of("staleness.report.page") > floor_of("launch.slurm")
    )
    text = "from conadv_lab.plan import plan_of\nif TYPE_CHECKING:\n    import conadv_lab.demo\n"
    assert list(imported(ast.parse(text), modules())) == ["plan"]
