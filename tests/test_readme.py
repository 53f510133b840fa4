"""The README's Python runs, and what its shell lines name exists."""

import re
from pathlib import Path

import pytest

from conadv_lab.cli import parse_config
from conadv_lab.recipes import find

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_train_lines_name_recipes_and_fields_that_exist():
    lines = re.findall(r"python -m conadv_lab\.train (\S+)(.*)", README)
    named = [(recipe, words) for recipe, words in lines if not recipe.startswith("-")]
    assert len(named) >= 4
    for recipe, words in named:
        plain = re.split(r"[`#|]", words)[0].split()
        if "--help" not in plain:
            parse_config(find(recipe.strip("`")), plain, prog="train")


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w[\w-]*)", README)) - {"PYTHON"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_nothing_is_left_to_be_filled_in():
    assert "@@" not in README
