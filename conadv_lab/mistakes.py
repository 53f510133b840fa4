"""How a user's mistake is told: the value, what is allowed, and the nearest right name."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, value: str, allowed: Iterable[str]) -> ValueError:
    """An error for a name that is not among the allowed ones; raise what it returns.

    >>> str(unknown("optimizer", "lras", ["lars", "lamb", "sgd"]))
    "unknown optimizer 'lras'; allowed: lamb, lars, sgd. Did you mean 'lars'?"
    """
    names = sorted(allowed)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {value!r}; allowed: {', '.join(names)}.{hint}")


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the value and what is allowed unless ``condition`` holds.

    >>> require(-1 >= 0, "staleness", -1, "a whole number of at least 0")
    Traceback (most recent call last):
    ValueError: staleness is -1; allowed: a whole number of at least 0
    """
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
