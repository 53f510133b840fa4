"""Commands that the documents show exist, and their parsers know the options. None of them is carried out.

A command runs as the module's ``__main__`` until its parser has read the words. Words in capitals stand for something:
`STANDS_FOR` says for what, all others are taken as they are, as names of files.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from conadv_lab.config import Config, resolved
from tests.docs.pages import ROOT, Page, markdown, notebooks

MODULES = ("conadv_lab", "analysis", "benchmarks", "notebooks", "tests")
VERBS = "run|sweep|status|logs|cancel|retry|collect|show"
STANDS_FOR = {"RECIPE": "digits-conadv", "N": "2", "VERB": "--help", "A,B": "trace"}
MODULES_NAMED = {"analysis.NAME": "analysis.cost", "benchmarks.NAME": "benchmarks.lars"}
OWN = "from conadv_lab.config import Config\n\n\ndef function():\n    return Config()\n\n\n"
OWN += "recipe = function\n\n\ndef grid():\n    return [Config(), Config().replace(seed=1)]\n"


class Parsed(BaseException):
    """The words were read; holds what the parser made of them."""


@contextlib.contextmanager
def parsing_only() -> Iterator[None]:
    """Within, a parser that has read its words ends the command."""

    def ending(parse: Any) -> Any:
        def parsed(*args: Any, **kwargs: Any) -> None:
            raise Parsed(parse(*args, **kwargs))

        return parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", ending(argparse.ArgumentParser.parse_args))
        patch.setattr(tyro, "cli", ending(tyro.cli))
        yield


def commands(page: Page) -> set[tuple[str, ...]]:
    """(module, words …) of every command of ours on a page, in full or as ``train …`` and ``submit VERB …``."""
    found = set()
    for line in page.shell():
        for part in re.split(r"&&|;|\||\$\(", line):
            part = re.sub(rf"^(?=submit ({VERBS}) |train (…|RECIPE))", "python -m conadv_lab.", part.strip())
            part = re.sub(r"\b(train|run|sweep) …", r"\1 RECIPE", part)
            match = re.search(r"(?:python|torchrun) -m (\w[\w.]*)(.*)", part)
            if match and match[1].partition(".")[0] in MODULES:
                words = words_of(match[2]) or ["--help"]  # named alone, it has to be there
                found.add((MODULES_NAMED.get(match[1], match[1]), *words))
    return found


def words_of(text: str) -> list[str]:
    """The words of a command line; what a usage line leaves open is left out."""
    text = re.sub(r"\[?--field value(,value)?[^\]]*\]?", "", text).replace("[", " ").replace("]", " ")
    words = [word for word in shlex.split(text.rstrip('`"')) if word not in ("…", "...", ">", "(")]
    return [STANDS_FOR.get(word, word) for word in words]


def read(module: str, *words: str) -> Any:
    """What the command's parser makes of the words, or None where it only tells something, as ``--help``.

    Raises:
        ValueError: the command does not exist, or does not take these words.
    """
    told = io.StringIO()
    # A sweep reads its lists after its other options, so it goes on, and tells what it would send.
    sweep = module == "conadv_lab.submit" and words[0] == "sweep" and "--help" not in words
    more = ["--dry-run", *([] if "--out" in words else ["--out", "DIR"])] if sweep else []
    until = contextlib.nullcontext() if sweep else parsing_only()
    with pytest.MonkeyPatch.context() as patch, until, contextlib.redirect_stderr(told):
        patch.setattr(sys, "argv", [module, *words, *more])
        try:
            with contextlib.redirect_stdout(told):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Parsed as parsed:
            (made,) = parsed.args
            sections = [field.name for field in dataclasses.fields(Config)]
            whole = all(hasattr(made, name) for name in sections)
            return resolved(Config(**{name: getattr(made, name) for name in sections})) if whole else made
        except ImportError as missing:
            raise ValueError(f"python -m {module}: {missing}") from missing
        except SystemExit as end:
            if end.code not in (0, None):
                raise ValueError(f"python -m {module} {' '.join(words)}\n{told.getvalue()}") from end
    return None


@pytest.fixture(autouse=True)
def _own_files(tmp_path, monkeypatch):
    """A folder with the files of a user's own that documents name."""
    for name in ("my.py", "mine.py", "path/to/file.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONADV_PROFILES", str(ROOT / "slurm/profiles"))


PAGES = [page for page in [*markdown(), *notebooks()] if commands(page)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_commands_exist_and_know_their_options(page):
    for command in sorted(commands(page)):
        read(*command)


@pytest.mark.parametrize(
    "line",
    [
        "python -m conadv_lab.train digits-conadv --lrr 0.1",
        "python -m conadv_lab.train digits-conadvv",
        "python -m conadv_lab.train digits-conadv --method conadvv",
        "python -m conadv_lab.submit sweep digits-conadv --out DIR --seeds 0,1",
        "python -m conadv_lab.submit statuss DIR",
        "python -m conadv_lab.sharpness runs/mine --htm report.html --jsn x",
        "python -m conadv_lab.staleness timeline --device 4",
        "python -m analysis.cost --scale tiny",
        "python -m analysis.costs",
        "python -m benchmarks.step --thread 1 --batchh 2",
        "submit run RECIPE --outt DIR",
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_stale_command_is_found(line):
    (command,) = commands(Page("page.md", f"```\n{line}  # words\n```\n"))
    with pytest.raises(ValueError):  # noqa: PT011 - each parser has its own words
        read(*command)


def targets(page: Page) -> set[str]:
    """The targets and variables of every ``make …`` on a page."""
    found: set[str] = set()
    for line in page.shell():
        for part in re.split(r"&&|;", line):
            match = re.match(r"(?:timeout \S+ \S+ )?make ([\w=/.\- ]+)", part.strip())
            if match:
                found |= {word.partition("=")[0] for word in match[1].split()}
    return found


def unknown_targets(page: Page, makefile: str) -> list[str]:
    return [
        name for name in sorted(targets(page)) if not re.search(rf"^{name}( \?=|:)", makefile, re.MULTILINE)
    ]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert sum(len(targets(page)) for page in markdown()) >= 8
    for page in markdown():
        assert unknown_targets(page, makefile) == [], page.path


def test_an_unknown_make_target_is_found():
    page = Page("page.md", "```\nmake tset   # tests\nmake KILLS=3 test\n```\nand `make demoo`\n")
    assert unknown_targets(page, "KILLS ?= 1\ntest: setup\n") == ["demoo", "tset"]


def test_the_folder_of_own_files_is_not_the_repository():
    assert Path.cwd() != ROOT
