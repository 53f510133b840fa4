"""Pins, metadata and commands agree with one another, and start without torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(name): version for name, version in (line.split("==") for line in lines)}


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", requirement)[0]).lower()


def test_every_dependency_is_pinned():
    optional = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *optional["dev"], *optional["notebooks"]]
    assert {_name(requirement) for requirement in wanted} <= pinned().keys()


def test_pins_are_in_the_ranges_and_installed():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    for text in project()["dependencies"]:
        requirement = Requirement(text)
        pin = pinned()[_name(text)]
        assert requirement.specifier.contains(pin), text
        assert version(requirement.name).split("+")[0] == pin


def test_conda_installs_the_same_package_from_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "--constraint constraints.txt" in text
    assert "--editable .[dev,notebooks]" in text  # JupyterLab too
    python = re.search(r"python=(3\.\d+)", text).group(1)
    low, high = re.search(r">=(3\.\d+),<(3\.\d+)", project()["requires-python"]).groups()
    assert (
        tuple(map(int, low.split(".")))
        <= tuple(map(int, python.split(".")))
        < tuple(map(int, high.split(".")))
    )
    assert "constraints.txt --editable '.[dev]'" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import conadv_lab"],
        ["-m", "conadv_lab"],
        ["-m", "conadv_lab.train", "--help"],
        ["-m", "conadv_lab.train", "--list"],
        ["-m", "conadv_lab.train", "digits-conadv", "--help"],
        ["-m", "conadv_lab.demo", "--help"],
        *(["-m", "conadv_lab.submit", *verb, "--help"] for verb in ([], ["run"], ["status"], ["retry"])),
        ["-m", "conadv_lab.sharpness", "--help"],
        *(
            ["-m", "conadv_lab.staleness", "dynamics", *what, "--help"]
            for what in ([], ["digits-conadv"], ["quadratic"])
        ),
        ["-m", "conadv_lab.staleness", "theory", "--help"],
    ],
    ids=lambda words: " ".join(words),
)
def test_help_and_import_do_not_import_torch(words):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "conadv_lab" in imported
    assert "torch" not in imported
    assert "usage" in run.stdout or "--help" not in words


def test_the_public_names_are_there():
    import conadv_lab as cl

    for name in cl.__all__:
        assert getattr(cl, name) is not None
    with pytest.raises(AttributeError, match="'conadv'"):
        _ = cl.conadv


def test_the_citation_names_the_paper_and_the_version():
    import yaml

    import conadv_lab

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"] == conadv_lab.__version__
    assert citation["license"] == project()["license"]
    assert citation["authors"] == [{"name": author["name"]} for author in project()["authors"]]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Chen", "Cheng", "Hsieh", "You"]
    assert (paper["year"], paper["type"]) == (2022, "conference-paper")
