"""Optional packages: imported where they are used, with a one-sentence error if they are missing."""

from importlib import import_module
from types import ModuleType

INSTALL = "pip install 'conadv-lab[{extra}]'"


def load(package: str, extra: str, needed_by: str) -> ModuleType:
    """Import a package that the extra ``extra`` installs.

    Args:
        package: its import name, such as ``"timm"`` or ``"nvidia.dali"``.
        extra: a key of ``[project.optional-dependencies]`` in pyproject.toml.
        needed_by: what the user asked for, to begin the sentence: ``"model timm:resnet18"``.

    Raises:
        ValueError: the package is not installed, or cannot be imported; with the pip command.

    >>> load("json", "all", "this example").__name__
    'json'
    >>> load("no_such_package", "vision", "model timm:resnet18")
    Traceback (most recent call last):
    ValueError: model timm:resnet18 needs no_such_package, which is not installed: pip install 'conadv-lab[vision]'
    """
    try:
        return import_module(package)
    except (
        Exception
    ) as error:  # a broken installation can raise anything: RuntimeError, OSError, AttributeError …
        absent = isinstance(error, ModuleNotFoundError) and package.startswith(str(error.name))
        lines = str(error).strip().splitlines() or [""]
        why = "is not installed" if absent else f"cannot be imported ({type(error).__name__}: {lines[0]})"
        message = f"{needed_by} needs {package}, which {why}: {INSTALL.format(extra=extra)}"
        raise ValueError(message) from None
