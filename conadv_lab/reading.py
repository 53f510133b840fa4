"""Reads plain values from TOML, JSON or NAME=VALUE words, and checks them against a dataclass's types.

Libraries for this (msgspec, cattrs) report neither the wrong value nor the nearest valid key, and ignore unknown keys.
"""

import ast
import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from conadv_lab.mistakes import unknown

Kind = TypeVar("Kind")


def toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML; ``where`` names its source in errors."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not valid TOML: {error}") from None


def pairs(option: str, words: Sequence[str], allowed: str = "NAME=VALUE") -> dict[str, Any]:
    """``["k=10", "rhos=(0.1,)"]`` as a mapping; values are Python literals, or else strings.

    >>> pairs("--set", ["k=10", "likelihood=gaussian"])
    {'k': 10, 'likelihood': 'gaussian'}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{option} is {word!r}; allowed: {allowed}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def read(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Build a dataclass from plain values; lists become tuples.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or a missing key.
    """
    require_kinds(kind, values, where)
    nothing, own = dataclasses.MISSING, dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [f.name for f in own if f.default is nothing and f.default_factory is nothing]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def require_kinds(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` at the first key that is not a field, or value that is not of its field's type."""
    kinds = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in kinds:
            raise unknown(f"key of {where}", key, kinds)
        if not fits(value, kinds[key]):
            raise ValueError(f"{key} in {where} is {value!r}; allowed: {allowed(kinds[key])}")


def require_kind(name: str, value: object, kind: Any) -> None:
    """Raise ``ValueError`` unless a value has a field's type; a wrong name is told the nearest right one.

    >>> require_kind("capture", "of", Literal["auto", "on", "off"])
    Traceback (most recent call last):
    ValueError: unknown capture 'of'; allowed: auto, off, on. Did you mean 'off'?
    """
    if fits(value, kind):
        return
    literals = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is Literal]
    if literals and isinstance(value, str):
        raise unknown(name, value, typing.get_args(literals[0]))
    raise ValueError(f"{name} is {value!r}; allowed: {allowed(kind)}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value has a field's type; integers count as numbers, booleans do not.

    >>> fits(3, float | None), fits(True, int), fits(["a"], tuple[str, ...]), fits("c", Literal["a", "b"])
    (True, False, True, False)
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        each = parts[:1] * len(value) if Ellipsis in parts and isinstance(value, (list, tuple)) else parts
        listed = isinstance(value, (list, tuple)) and len(value) == len(each)
        return listed and all(map(fits, value, each))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, origin or kind)


def allowed(kind: Any) -> str:
    """A field's type in words.

    >>> allowed(int | None), allowed(tuple[float, float])
    ('a whole number or None', 'a list of 2 numbers')
    >>> allowed(list[float | None])
    'a list of numbers or None'
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("None" if part is types.NoneType else allowed(part) for part in parts)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (tuple, list):
        count = "" if Ellipsis in parts or len(parts) < 2 else f"{len(parts)} "
        one, _, other = allowed(parts[0]).removeprefix("a ").partition(" or ")
        return f"a list of {count}{one}s{other and f' or {other}'}"
    told = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", dict: "a table"}
    return told.get(origin or kind, "a string")
