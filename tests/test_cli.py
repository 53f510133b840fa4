"""Mistakes in the words of a command line are one sentence each: the value, what is allowed, the nearest name."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from conadv_lab.cli import parse_config, parsed
from conadv_lab.config import Config
from conadv_lab.recipes.digits import conadv

MISTAKES = {
    "--epochs abc": "--epochs is 'abc'; allowed: a number",
    "--seed=1.5": "--seed is '1.5'; allowed: a whole number",
    "--epochs": "--epochs is without a value; allowed: a number",
    "--crop-padding zero": "unknown value of --crop-padding 'zero'; allowed: reflect, zeros. Did you mean 'zeros'?",
    "--weights 1": "--weights is '1'; allowed: a list of 2 numbers or None",
    "--train-images few": "--train-images is 'few'; allowed: a whole number or None",
    "--milestone_epochs 3 a": "--milestone-epochs is '3 a'; allowed: a list of numbers",
    "--foo 3": "unknown option --foo; allowed: options listed by --help.",
    "--epsilom 0.1": "unknown option --epsilom; allowed: options listed by --help. Did you mean --epsilon?",
    "--learning-rate 0.1": "unknown option --learning-rate; use --lr",
    "--batch-size 8": "unknown option --batch-size; use --global-batch",
    "--lr 0.1 extra": "'extra' does not belong to any option; allowed: options listed by --help",
    "--ntasks-per-node 2": "unknown option --ntasks-per-node; allowed: options listed by --help.",
    "--flip 3": "'3' does not belong to any option; allowed: options listed by --help",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence(words, capsys):
    with pytest.raises(ValueError) as told:  # noqa: PT011 - its whole text is compared
        parse_config(conadv, words.split(), "train")
    assert str(told.value) == MISTAKES[words]
    assert capsys.readouterr() == ("", "")


def test_a_missing_argument_is_named():
    @dataclass(frozen=True)
    class Asked:
        place: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PLACE")]
        html: Path

    with pytest.raises(ValueError, match=r"^PLACE is missing; allowed: a path$"):
        parsed(Asked, ["--html", "x"], "test")
    with pytest.raises(ValueError, match=r"^--html is missing; allowed: a path$"):
        parsed(Asked, ["there"], "test")


def test_words_become_the_recipes_config_with_changes():
    words = ["--lr=0.2", "--milestone_epochs", "1", "2", "--no-flip", "--out", "here", "--resume"]
    config, options = parse_config(conadv, words, "train")
    assert config == conadv().replace(lr=0.2, milestone_epochs=(1.0, 2.0), flip=False)
    assert (options.out, options.resume) == (Path("here"), True)
    assert parse_config(Config, [], "train")[0] == Config()


def test_every_heading_is_there_once_and_what_is_used_most_comes_first(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(conadv, ["--help"], "train")
    assert stop.value.code == 0
    told = capsys.readouterr().out
    headings = re.findall(r"^\W+((?:[a-z ]+ )?options) \W+$", told, re.MULTILINE)
    assert headings == [
        "options", "training options", "method options", "optimizer and learning rate options", "data options",
        "model options",
    ]  # fmt: skip
    assert told.index("Most used: --method, --epsilon") < told.index("--out ") < told.index("--epochs ")


def test_options_of_a_part_and_words_without_names():
    @dataclass(frozen=True)
    class Files:
        csv: Path | None = None

    @dataclass(frozen=True)
    class Asked:
        folders: tyro.conf.Positional[tuple[Path, ...]]
        kind: Literal["a", "b"] = "a"
        files: Files = field(default_factory=Files)

    asked = parsed(Asked, ["one", "two", "--csv", "x"], "test")
    assert asked.folders == (Path("one"), Path("two"))
    assert asked.files == Files(Path("x"))
    with pytest.raises(ValueError, match=r"unknown option --cvs; .* Did you mean --csv\?"):
        parsed(Asked, ["one", "--cvs", "x"], "test")
