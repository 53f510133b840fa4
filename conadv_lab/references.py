"""A user's own method, recipe, model or data set: ``path/to/file.py:function``."""

import importlib.util
import inspect
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab.mistakes import unknown

if TYPE_CHECKING:
    from conadv_lab.config import Config

COPIES = "own"
"""Folder of the copies that submit makes of such files, each in a folder of its content's hash."""


def is_file_reference(name: str) -> bool:
    """Whether a name is a user's own ``path/to/file.py:function``."""
    return ".py:" in name


def named_in(config: "Config") -> dict[str, str]:
    """The references among the fields of a config, by field: code that building its objects runs."""
    fields = {"dataset": config.data.dataset, "model": config.model.model, "method": config.method.method}
    return {name: value for name, value in fields.items() if is_file_reference(value)}


def load(reference: str) -> Any:
    """The function that ``path/to/file.py:function`` names.

    The file's folder is put on the path of modules, as for a script, so that it can import what lies beside it.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    place, _, name = reference.rpartition(":")
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"{reference!r} names no file: {path} does not exist; allowed: path/to/file.py:function"
        )
    # One module a file, so that two references to it share their classes.
    module_name = "conadv_lab_user_" + sha256(str(path).encode()).hexdigest()[:12]
    module = sys.modules.get(module_name)
    if module is None:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(module, name):
        own = [key for key in vars(module) if not key.startswith("_")]
        raise unknown(f"name in {path.name}", name, own)
    return getattr(module, name)


def made(reference: str, *arguments: object, returns: str) -> Any:
    """What the function that a reference names returns for these arguments: a config, or none.

    Raises:
        ValueError: no such function, or one of other arguments.
    """
    function = load(reference)
    takes = "one argument, the config," if arguments else "no arguments"
    allowed = f"allowed: a function of {takes} that returns {returns}"
    if not callable(function):
        raise ValueError(f"{reference} is of type {type(function).__name__}; {allowed}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some builtins none is known
        return function(*arguments)
    try:
        signature.bind(*arguments)
    except TypeError:
        what = "a class" if isinstance(function, type) else "a function"
        raise ValueError(f"{reference} is {what} that takes {signature}; {allowed}") from None
    return function(*arguments)
