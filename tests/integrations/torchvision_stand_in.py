"""Lets timm be imported where torchvision cannot be, as beside torch's CPU build.

timm needs torchvision for reading and augmenting images, which no test here does. Its networks only ask whether a layer
is a ``FrozenBatchNorm2d``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

PARTS = ("datasets", "models", "ops", "ops.misc", "transforms", "transforms.functional", "utils")


class _Named(type):
    """A class whose attributes are their own names, such as an enumeration's."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Part(ModuleType):
    """A module that has a class of any name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


def modules() -> dict[str, ModuleType]:
    found = {name: _Part(name) for name in ("torchvision", *(f"torchvision.{part}" for part in PARTS))}
    for name, part in found.items():
        part.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, part)
    return found


@contextmanager
def _in_place() -> Iterator[None]:
    made = modules()
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def timm() -> Any:
    """timm with the real torchvision where it can be imported, else with the stand-in while it is imported."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    try:
        import_module("torchvision")
    except Exception:  # such as an operator that this torch does not have
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        with _in_place():
            return import_module("timm")
    return import_module("timm")
