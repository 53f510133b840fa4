"""Train one recipe here: ``python -m conadv_lab.train RECIPE [--field value …] [--out DIR] [--resume]``."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conadv_lab.config import Config, resolved

if TYPE_CHECKING:
    from conadv_lab.cli import Options
    from conadv_lab.training.loop import Run

USAGE = """usage: python -m conadv_lab.train RECIPE [--out DIR] [--resume] [--field value ...]
       python -m conadv_lab.train RECIPE --plan [--devices N]    what a step will take, nothing trained
       python -m conadv_lab.train --list            the recipes, one a line
       python -m conadv_lab.train RECIPE --help     every field, with its default in this recipe

RECIPE is a name or path/to/file.py:function. Exit status: 0 done, 2 a mistake in what was asked,
1 a failure, 75 stopped on request and resumable.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        if "--list" in words:
            return _list()
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if words else 2
        config, options = parse(words)
        out, resume = options.out or _folder(words[0], config), options.resume
        resolved(config)
        if options.plan:
            from conadv_lab.plan import plan_of

            print(plan_of(config, options.devices).text())
            return 0
        from conadv_lab.training.loop import prepare

        run = prepare(config, out, resume=resume)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return _train(run, out)


def parse(words: Sequence[str]) -> tuple[Config, "Options"]:
    """(config, this command's options) from the words of a command line.

    Raises:
        ValueError: an unknown recipe.
        SystemExit: an unknown field or a value of the wrong type, told by the parser (status 2).
    """
    from conadv_lab.cli import parse_config
    from conadv_lab.recipes import find

    recipe = find(words[0])
    return parse_config(recipe, words[1:], prog=f"conadv_lab.train {words[0]}")


def _folder(recipe: str, config: Config) -> Path:
    name = recipe.rpartition(":")[2] if ":" in recipe else recipe
    method, training = config.method.method.rpartition(":")[2], config.training
    return Path("runs") / f"{name}-{method}-b{training.global_batch}-s{training.seed}"


def _list() -> int:
    from conadv_lab.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"{name:{width}}  {_sentence(recipe)}")
    return 0


def _sentence(recipe: Callable[[], Config]) -> str:
    return (recipe.__doc__ or "").strip().splitlines()[0]


def _train(run: "Run | None", out: Path) -> int:
    from conadv_lab.training.loop import NotFinite, StoppedOnRequest

    try:
        if run is not None:
            run.to_the_end()
    except StoppedOnRequest as stop:
        print(stop, file=sys.stderr)
        print(out)
        return 75
    except (NotFinite, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
