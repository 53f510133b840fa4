"""Things chosen by name: each entry has a description and the location of its code, imported at first use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A short description, ``about``, and the code's location, ``place``, as ``module:function``.

    ``reads`` names the config's fields that it reads and not every other thing of its kind does.

    >>> Entry("the square root", "math:sqrt").load()(9.0)
    3.0
    """

    about: str
    place: str
    reads: tuple[str, ...] = field(default=(), kw_only=True)

    def load(self) -> Any:
        module, _, name = self.place.partition(":")
        return getattr(import_module(module), name)


def described(title: str, entries: Mapping[str, Entry]) -> str:
    """A title and one line per name, for a section's help."""
    return "\n".join([f"{title}:", *(f"- {name}: {entry.about}" for name, entry in entries.items())])
