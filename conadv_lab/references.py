"""A user's own method, recipe, model or data set, given as ``path/to/file.py:function``."""

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
"""Folder for submit's copies of such files, each in a subfolder named by its content's hash."""


def is_file_reference(name: str) -> bool:
    """Whether a name has the form ``path/to/file.py:function``."""
    return ".py:" in name


def named_in(config: "Config") -> dict[str, str]:
    """A config's file references, by field: code that runs when its objects are built."""
    fields = {"dataset": config.data.dataset, "model": config.model.model, "method": config.method.method}
    return {name: value for name, value in fields.items() if is_file_reference(value)}


def load(reference: str) -> Any:
    """Load the function that ``path/to/file.py:function`` refers to.

    The file's folder is added to ``sys.path``, as for a script, so that the file can import its neighbours.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    place, _, name = reference.rpartition(":")
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"{reference!r} refers to a missing file: {path} does not exist; allowed: path/to/file.py:function"
        )
    # One module per file, so that two references to it share their classes.
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
    """Call the function that a reference names, with a config or no argument.

    Raises:
        ValueError: no such function, or it takes other arguments.
    """
    function = load(reference)
    takes = "one argument, the config," if arguments else "no arguments"
    allowed = f"allowed: a function of {takes} that returns {returns}"
    if not callable(function):
        raise ValueError(f"{reference} is of type {type(function).__name__}; {allowed}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have no signature
        return function(*arguments)
    try:
        signature.bind(*arguments)
    except TypeError:
        what = "a class" if isinstance(function, type) else "a function"
        raise ValueError(f"{reference} is {what} that takes {signature}; {allowed}") from None
    return function(*arguments)
