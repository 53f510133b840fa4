r"""Turns a recipe and command-line options into the configs of one or many runs.

A value with commas is a list, and several lists form a grid: ``--lr 0.1,0.2 --seed 0,1,2`` gives six runs. Write a
comma that belongs to a value as ``\,``. For fields that take several words, such as ``--weights``, and for anything
that is not a grid, use a Python file: a function that returns a list of configs. Command-line options then change
all of them.
"""

import dataclasses
import itertools
import json
import re
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from hashlib import sha256
from typing import Any

from conadv_lab.config import Config, resolved
from conadv_lab.mistakes import unknown
from conadv_lab.references import is_file_reference


@dataclass(frozen=True)
class Planned:
    """One run: the name of its folder, its resolved config, and the hash of the config that identifies it."""

    name: str
    config: Config
    identity: str


def plan(recipe: str, words: Sequence[str], options: Any, verb: str = "sweep") -> tuple[list[Planned], Any]:
    """The runs that a recipe and the options of ``submit sweep`` or ``run`` describe, and the command's own options.

    Raises:
        ValueError: an unknown recipe or field, a repeated value, an invalid config.
        SystemExit: status 0 after ``--help``.
    """
    from conadv_lab.cli import parse_config

    bases = bases_of(recipe)
    own = {f.name for f in dataclasses.fields(options)}
    single, lists = split_lists(words, own if verb == "sweep" else own | _texts())
    if lists and verb != "sweep":
        name, listed = next(iter(lists.items()))
        raise ValueError(
            f"--{name.replace('_', '-')} is {','.join(listed)!r}; allowed: one value. Use submit sweep for a list"
        )
    first, parsed = parse_config(
        lambda: bases[0], single, f"conadv_lab.submit {verb} {recipe}", options, about=_about(recipe)
    )
    if len(bases) > 1:
        given = {name: value for name, value in _flat(first).items() if name in _named(single)}
        bases = [base.replace(**given) for base in bases]
    else:
        bases = [first]
    values = parse_lists(lists)
    configs = [
        base.replace(**dict(zip(values, chosen, strict=True)))
        for base in bases
        for chosen in itertools.product(*values.values())
    ]
    return named(configs), parsed


def _about(recipe: str) -> str:
    from conadv_lab import references
    from conadv_lab.recipes import find

    function = references.load(recipe) if is_file_reference(recipe) else find(recipe)
    return function.__doc__ or ""


def bases_of(recipe: str) -> list[Config]:
    """The config of a recipe, or the configs that a user's function returns.

    Raises:
        ValueError: an unknown recipe, or a function that returns something else.
    """
    from conadv_lab import references
    from conadv_lab.recipes import find

    if not is_file_reference(recipe):
        return [find(recipe)()]
    made = references.made(recipe, returns="a Config or a list of them")
    bases = [made] if isinstance(made, Config) else made
    if not isinstance(bases, list) or not bases or not all(isinstance(base, Config) for base in bases):
        raise ValueError(
            f"{recipe} is not a sweep; allowed: a function that returns a Config or a list of them"
        )
    return bases


def split_lists(words: Sequence[str], own: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    r"""Separate options with a list of values from the other words; the options in ``own`` never have a list.

    >>> split_lists(["--lr", "0.1,0.2", "--epochs", "3", "--seed=0,1"], own=set())
    (['--epochs', '3'], {'lr': ['0.1', '0.2'], 'seed': ['0', '1']})
    >>> split_lists(["--data-dir", r"/data/a\,b"], own=set())
    (['--data-dir', '/data/a,b'], {})
    """
    single: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = [part for word in words for part in _at_equals(word)]
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("--").replace("-", "_")
        values = re.split(r"(?<!\\),", rest[0]) if word.startswith("--") and name not in own and rest else []
        if len(values) > 1:
            if name in lists:
                raise ValueError(f"{word} is given twice; allowed: once, as one list of values")
            lists[name] = [value.replace("\\,", ",") for value in values]
            rest.pop(0)
        else:
            single.append(word.replace("\\,", ","))
    return single, lists


def parse_lists(lists: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The typed values of each list.

    Raises:
        ValueError: an unknown field, a value of the wrong type, a field that takes several words, a repeated value.
    """
    from conadv_lab.cli import parsed

    if not lists:
        return {}
    kinds = _kinds()
    for name, values in lists.items():
        option = name.replace("_", "-")
        if name not in kinds:
            raise unknown("option", option, [kind.replace("_", "-") for kind in kinds])
        if typing.get_origin(kinds[name]) is tuple or "tuple" in str(kinds[name]):
            raise ValueError(
                f"--{option} takes several words, so it cannot be a list; write the sweep as a Python file"
            )
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"--{option} lists {min(twice)!r} twice; allowed: each value once")
    shape = make_dataclass("Lists", [(name, list[kinds[name]]) for name in lists])  # type: ignore[valid-type, misc]
    words = [word for name, values in lists.items() for word in (f"--{name.replace('_', '-')}", *values)]
    found: Any = parsed(shape, words, "conadv_lab.submit sweep")
    return {name: list(getattr(found, name)) for name in lists}


def named(configs: list[Config]) -> list[Planned]:
    """Each config, resolved, with a folder name made of the fields that were varied.

    Raises:
        ValueError: two are equal, or one is invalid.
    """
    flats = [_flat(config) for config in configs]
    varied = [name for name in flats[0] if any(flat[name] != flats[0][name] for flat in flats)]
    runs: dict[str, Planned] = {}
    for number, (config, flat) in enumerate(zip(configs, flats, strict=True)):
        config = resolved(config)
        known = identity(config)
        if known in runs:
            raise ValueError(
                f"run {number} of the sweep equals {runs[known].name}; allowed: each config once"
            )
        runs[known] = Planned(
            "-".join(f"{name}={_short(flat[name])}" for name in varied) or "run", config, known
        )
    return _told_apart(list(runs.values()))


def identity(config: Config) -> str:
    """A hash of a resolved config."""
    return sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _told_apart(runs: list[Planned]) -> list[Planned]:
    names = Counter(run.name for run in runs)
    return [
        run if names[run.name] == 1 and len(run.name) <= 120
        else dataclasses.replace(run, name=f"{run.name[:100]}-{run.identity[:8]}")
        for run in runs
    ]  # fmt: skip


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    text = text.rpartition("/")[2] if is_file_reference(text) else text
    return re.sub(r"[^A-Za-z0-9.+]+", "_", text).strip("_")


def _flat(config: Config) -> dict[str, Any]:
    # to_dict copies deeply, which is slow for thousands of runs.
    sections = (getattr(config, section.name) for section in dataclasses.fields(Config))
    return {f.name: getattr(section, f.name) for section in sections for f in dataclasses.fields(section)}


def _kinds() -> dict[str, Any]:
    sections = typing.get_type_hints(Config).values()
    return {name: kind for section in sections for name, kind in typing.get_type_hints(section).items()}


def _texts() -> set[str]:
    """Text fields, whose single value may contain commas."""
    return {name for name, kind in _kinds().items() if kind is str}


def _named(words: Sequence[str]) -> set[str]:
    names = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _at_equals(word: str) -> list[str]:
    return list(word.split("=", 1)) if word.startswith("--") and "=" in word else [word]
