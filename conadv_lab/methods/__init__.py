"""How one step's gradient is computed. All facts about methods are available here without torch."""

from dataclasses import fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from conadv_lab import references
from conadv_lab.methods import families
from conadv_lab.methods.base import Method, Vanilla

if TYPE_CHECKING:
    from conadv_lab.config import Config


def _found() -> dict[str, type[Method]]:
    """Vanilla, and every class with a ``name`` in a file of `families`."""
    files = [import_module(f"{families.__name__}.{one.name}") for one in iter_modules(families.__path__)]
    classes = [Vanilla, *(kind for file in files for kind in vars(file).values() if isinstance(kind, type))]
    return {kind.name: kind for kind in classes if issubclass(kind, Method) and vars(kind).get("name")}


METHODS = _found()
"""Every method by name."""


def options() -> list[Any]:
    """The dataclasses whose fields methods read, each once and after its bases."""
    read = (part for method in METHODS.values() for part in method.reads)
    return list(dict.fromkeys(kind for part in read for kind in reversed(part.__mro__) if is_dataclass(kind)))


def filled(config: "Config") -> "Config":
    """The config with options that are None filled in by its method."""
    section, kind = config.method, METHODS.get(config.method.method, Method)
    values = {"attack_step": section.epsilon, "attack_steps": 1, "staleness": 1} | kind.filled(config)
    return config.replace(**{n: value for n, value in values.items() if getattr(section, n) is None})


def described() -> str:
    """One line per method: what a step trains on."""
    return "\n".join(f"- {name}: {method.about}" for name, method in METHODS.items())


def options_of(name: str) -> list[str]:
    """The command-line options that a method reads.

    >>> options_of("asyncsam")
    ['--rho', '--perturbation', '--staleness']
    """
    return [f"--{option.replace('_', '-')}" for option in fields_of(METHODS[name])]


def fields_of(method: type[Method]) -> list[str]:
    """The fields of the config that a method reads."""
    return list(dict.fromkeys(field.name for part in method.reads for field in fields(part)))


def method_of(config: "Config") -> Method:
    """The method of a config, built-in or a user's.

    Raises:
        ValueError: a user's function returns something else, or options are incompatible.
    """
    name = config.method.method
    if name in METHODS:
        return METHODS[name].of(filled(config))
    method = references.made(name, config, returns="a conadv_lab Method")
    if not isinstance(method, Method):
        raise ValueError(f"{name} returned {type(method).__name__}; allowed: a conadv_lab Method")
    method.name, method.label = name, method.label or name.rpartition(":")[2]
    return method
