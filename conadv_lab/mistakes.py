"""Error messages for users' mistakes: the value, what is allowed, and the nearest valid name."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import isfinite
from numbers import Integral
from pathlib import Path


def unknown(what: str, value: str, allowed: Iterable[str]) -> ValueError:
    """An error to raise for a name that is not among the allowed ones.

    >>> str(unknown("optimizer", "lras", ["lars", "lamb", "sgd"]))
    "unknown optimizer 'lras'; allowed: lamb, lars, sgd. Did you mean 'lars'?"
    >>> str(unknown("optimizer", "SGD", ["lars", "sgd"]))
    "unknown optimizer 'SGD'; allowed: lars, sgd. Did you mean 'sgd'?"
    """
    names = sorted(allowed)
    by_lower = {name.lower(): name for name in names}
    near = get_close_matches(value.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
    if value.endswith(".py"):
        hint = f" Of a file, name the function too: {value}:function"
    return ValueError(f"unknown {what} {value!r}; allowed: {', '.join(names)}.{hint}")


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the value and what is allowed unless ``condition`` holds.

    >>> require(-1 >= 0, "staleness", -1, "a whole number of at least 0")
    Traceback (most recent call last):
    ValueError: staleness is -1; allowed: a whole number of at least 0
    """
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def require_number(**given: object) -> None:
    """Raise ``ValueError`` unless each value is a finite number of at least 0.

    >>> require_number(rho=-0.1)
    Traceback (most recent call last):
    ValueError: rho is -0.1; allowed: a number of at least 0
    """
    for name, value in given.items():
        fine = isinstance(value, (int, float)) and value >= 0 and isfinite(value)
        require(fine, name, value, "a number of at least 0")


def require_count(least: int = 1, **given: object) -> None:
    """Raise ``ValueError`` unless each value is a whole number of at least ``least``.

    >>> require_count(steps=2.5)
    Traceback (most recent call last):
    ValueError: steps is 2.5; allowed: a whole number of at least 1
    """
    for name, value in given.items():
        fine = isinstance(value, Integral) and int(value) >= least
        require(fine, name, value, f"a whole number of at least {least}")


Range = tuple[Callable[[float], bool], str]
"""A test for allowed numbers, and its description."""

FROM_0: Range = lambda value: value >= 0 and isfinite(value), "at least 0, and finite"
ABOVE_0: Range = lambda value: value > 0 and isfinite(value), "above 0, and finite"
BELOW_1: Range = lambda value: 0 <= value < 1, "at least 0 and below 1"
SHARE: Range = lambda value: 0 <= value <= 1, "0 to 1"
COUNT: Range = lambda value: value >= 1, "a whole number of at least 1"
COUNT_OR_0: Range = lambda value: value >= 0, "a whole number of at least 0"


def require_ranges(section: object, **ranges: Range) -> None:
    """Raise ``ValueError`` at the first field of a config section that is out of range; None is always allowed."""
    for name, (holds, allowed) in ranges.items():
        value = getattr(section, name)
        require(value is None or holds(value), name, value, allowed)


def warnings_in_a_line() -> None:
    """Print warnings of a command as one line each, without the place in the code."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)


def writable(*paths: Path | None) -> None:
    """Check that files can be created at these paths.

    Raises:
        ValueError: a path is a folder, or its parent folder does not exist.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written; allowed: a file in an existing folder")


def creatable(folder: Path, option: str = "--out") -> None:
    """Check that a folder exists or can be created.

    Raises:
        ValueError: it or a parent is a file, or the nearest existing parent is not writable.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        told = "a file" if there == folder else f"below {there}, which is a file"
        raise ValueError(f"{folder} is {told}; pass the path of a folder as {option}")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} is not writable; pass a folder in another place as {option}")


def counted(count: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "rank"), counted(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
