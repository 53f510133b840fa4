"""Turns command-line words into a dataclass or a config: every field is an option with the recipe's default."""

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from conadv_lab.config import Config
from conadv_lab.mistakes import unknown
from conadv_lab.reading import allowed

Kind = TypeVar("Kind")
MOST_USED = "method, epsilon, staleness, global-batch, micro-batch, optimizer, lr, epochs, seed, out"
SECTIONS = {
    "training": "training", "method": "method", "optimization": "optimizer and learning rate",
    "data": "data", "model": "model",
}  # fmt: skip
"""The config's sections in the order of the help, with their headings there."""
OUTPUT_FILES = tyro.conf.arg(name="output file")
"""Heading, in the help, of a field that holds `Tables` or `Outputs`."""
ALSO_CALLED = {
    "learning-rate": "lr", "batch-size": "global-batch", "batch": "global-batch", "eps": "epsilon", "tau": "staleness",
    "steps-per-epoch": "epochs", "num-workers": "workers", "output": "out", "wd": "weight-decay", "arch": "model",
    "ranks": "tasks-per-node", "ntasks-per-node": "tasks-per-node", "gpus": "gpus-per-node", "mem": "mem-gb",
    "time": "minutes",
}  # fmt: skip
"""Other common names of our options."""


@dataclass(frozen=True)
class Options:
    """Run folder, ranks and predictions."""

    out: Path | None = None
    """The run folder; None: runs/RECIPE-METHOD-bBATCH-sSEED."""
    resume: bool = False
    """Continue the run in the folder from its latest checkpoint."""
    ranks: int = 1
    """Train with this many processes on this machine, which share every step; torchrun and submit start their own."""
    plan: bool = False
    """Print predicted memory, network traffic and time for --devices, without training."""
    devices: int = 1
    """Number of devices that share a step, attackers included, for --plan."""


def parse_config(
    recipe: Callable[[], Config],
    words: Sequence[str],
    prog: str,
    options: Any = None,
    about: str | None = None,
) -> tuple[Config, Any]:
    """The recipe's config with the options among ``words`` applied, and the command's own options.

    Args:
        options: the command's own options, with their defaults; None: `Options`.
        about: first lines of the help; None: the recipe's docstring.

    Raises:
        ValueError: an unknown option, or a value of the wrong type.
        SystemExit: status 0 after ``--help``.
    """
    own, config = type(options or Options()), recipe()
    parts = [
        (name, Annotated[type(part), tyro.conf.arg(name=heading)], field(default=part))
        for name, heading in SECTIONS.items()
        for part in (getattr(config, name),)
    ]
    command = make_dataclass("Command", parts, bases=(own,), frozen=True)
    used = ", ".join(f"--{name}" for name in MOST_USED.split(", "))
    told = (recipe.__doc__ or "" if about is None else about).strip()
    found: Any = parsed(command, words, prog, f"{told}\n\nMost used: {used}.")
    chosen = own(**{one.name: getattr(found, one.name) for one in dataclasses.fields(own)})
    return Config(**{name: getattr(found, name) for name in SECTIONS}), chosen


def parsed(kind: type[Kind], words: Sequence[str], prog: str, description: str | None = None) -> Kind:
    """Parse options into a dataclass whose fields are the options.

    Raises:
        ValueError: what the parser rejects, in one sentence.
        SystemExit: status 0 after ``--help``.
    """
    kinds = _kinds(kind)
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name not in ("help", *kinds) and name.removeprefix("no-") not in kinds:
            raise _unknown_option(name, kinds)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                kind,
                args=list(words),
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise _refused(told.getvalue(), list(words), kinds)


def asked(kind: type[Kind], words: Sequence[str] | None, prog: str, description: str | None = None) -> Kind:
    """Like `parsed`, by default for the process's own arguments; prints an invalid argument's error and exits.

    Raises:
        SystemExit: status 2 after a mistake, 0 after ``--help``.
    """
    try:
        return parsed(kind, sys.argv[1:] if words is None else words, prog, description)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _kinds(kind: Any) -> dict[str, Any]:
    """Every option's type by name, including those of nested dataclasses."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        own = hints[one.name]
        found |= _kinds(own) if dataclasses.is_dataclass(own) else {one.name.replace("_", "-"): own}
    return found


def _unknown_option(name: str, kinds: Mapping[str, Any]) -> ValueError:
    if ALSO_CALLED.get(name) in kinds:
        return ValueError(f"unknown option --{name}; use --{ALSO_CALLED[name]}")
    hint = str(unknown("option", name, kinds)).rpartition(" Did you mean ")[2]
    near = f" Did you mean --{hint[1:-2]}?" if hint.startswith("'") else ""
    return ValueError(f"unknown option --{name}; allowed: options listed by --help.{near}")


def _refused(text: str, words: list[str], kinds: Mapping[str, Any]) -> ValueError:
    """The parser's multi-line box as one sentence, if it is about one of our options."""
    plain = " ".join(re.sub(r"[│╭╮╰╯|+]|[─-]{3,}", " ", text).partition("For full helptext")[0].split())
    option = re.search(r"--[a-z][\w-]*", plain)
    name = option[0].removeprefix("--").replace("_", "-") if option else ""
    refused = re.search(r"Error parsing \w+: (.+)", plain)
    if refused:  # by the dataclass itself
        return ValueError(refused[1])
    missing = re.search(r"Missing from [^:]*: (--[\w-]+|[A-Z_]+)", plain)
    if missing:
        kind = kinds.get(missing[1].removeprefix("--").replace("_", "-").lower())
        return ValueError(f"{missing[1]} is missing" + (f"; allowed: {allowed(kind)}" if kind else ""))
    if name not in kinds:
        loose = plain.rpartition("Unrecognized options: ")[2]
        return ValueError(f"{loose!r} does not belong to any option; allowed: options listed by --help")
    flat = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    place = max(i for i, word in enumerate(flat) if word.replace("_", "-") == f"--{name}")
    values = []
    for word in flat[place + 1 :]:
        if word.startswith("--"):
            break
        values.append(word)
    choices = typing.get_args(kinds[name]) if typing.get_origin(kinds[name]) is Literal else ()
    if choices and values:
        return unknown(f"value of --{name}", values[0], choices)
    given = repr(" ".join(values)) if values else "without a value"
    return ValueError(f"--{name} is {given}; allowed: {allowed(kinds[name])}")
