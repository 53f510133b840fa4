"""Recipes: functions that return a config. The docstring gives the command, the measured result and the time."""

from collections.abc import Callable

from conadv_lab import references
from conadv_lab.config import Config
from conadv_lab.mistakes import unknown
from conadv_lab.recipes import cifar, digits, imagenet, nofrost
from conadv_lab.references import is_file_reference

Recipe = Callable[[], Config]

RECIPES: dict[str, Recipe] = {**digits.RECIPES, **cifar.RECIPES, **imagenet.RECIPES, **nofrost.RECIPES}


def find(name: str) -> Recipe:
    """A recipe by name, or a user's by ``path/to/file.py:function``.

    Raises:
        ValueError: an unknown name, or a function that does not return a config.
    """
    if not is_file_reference(name):
        if name not in RECIPES:
            raise unknown("recipe", name, RECIPES)
        return RECIPES[name]
    config = references.made(name, returns="a Config")
    if not isinstance(config, Config):
        raise ValueError(
            f"{name} is not a recipe; allowed: a function without arguments that returns a Config"
        )
    return references.load(name)
