"""Train one recipe here: ``python -m conadv_lab.train RECIPE [--field value …] [--out DIR] [--resume] [--ranks N]``."""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conadv_lab.config import Config, resolved, tell_without_effect
from conadv_lab.launch import ranks
from conadv_lab.mistakes import require, unknown, warnings_in_a_line
from conadv_lab.pipes import outlive_readers
from conadv_lab.training.stopping import interrupts_end_the_process

if TYPE_CHECKING:
    from conadv_lab.cli import Options

USAGE = """usage: python -m conadv_lab.train RECIPE [--out DIR] [--resume] [--ranks N] [--field value ...]
       python -m conadv_lab.train RECIPE --plan [--devices N]    predict memory and time, train nothing
       python -m conadv_lab.train --list            list the recipes; --list methods: the methods
       python -m conadv_lab.train RECIPE --help     every option, with its default in this recipe

RECIPE is a name or path/to/file.py:function. Exit status: 0 success, 2 invalid arguments,
1 failure, 75 stopped on request (--resume continues), 130 stopped at once by a second Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings_in_a_line()
    try:
        if "--list" in words:
            return _list([word for word in words if word != "--list"])
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if words else 2
        config, out, options = parse(words)
        tell_without_effect(resolved(config), words[1:])
        if options.plan:
            from conadv_lab.plan import plan_of

            print(plan_of(config, options.devices).text())
            return 0
    except ValueError as mistake:
        _tell(mistake)
        return 2
    if options.ranks > 1 and "RANK" not in os.environ:
        return ranks.start([sys.executable, "-m", "conadv_lab.train", *words], options.ranks)
    with interrupts_end_the_process():
        return _train(config, out, options.resume)


def parse(words: Sequence[str]) -> tuple[Config, Path, "Options"]:
    """(config, run folder, other options) from command-line words.

    Raises:
        ValueError: an unknown recipe or option, a value of the wrong type, or --ranks within an already started rank.
    """
    from conadv_lab.cli import parse_config
    from conadv_lab.recipes import find

    if words[0].startswith("-"):
        raise ValueError(f"the first word is {words[0]!r}; allowed: a recipe, before any option (see --list)")
    recipe = find(words[0])
    config, options = parse_config(recipe, words[1:], prog=f"conadv_lab.train {words[0]}")
    _check_ranks(options.ranks)
    if options.devices != 1 and not options.plan:
        raise ValueError(
            f"devices is {options.devices}; allowed: with --plan only; --ranks trains with several processes"
        )
    return config, options.out or _folder(words[0], config), options


def _check_ranks(count: int) -> None:
    there = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else None
    require(count >= 1, "ranks", count, "a whole number of at least 1")
    if count > 1 and there not in (None, str(count)):
        raise ValueError(f"ranks is {count}, but this is already one of {there} ranks; leave --ranks out")


def _folder(recipe: str, config: Config) -> Path:
    name = recipe.rpartition(":")[2] if ":" in recipe else recipe
    method, training = config.method.method.rpartition(":")[2], config.training
    return Path("runs") / f"{name}-{method}-b{training.global_batch}-s{training.seed}"


def _list(words: list[str]) -> int:
    from conadv_lab.methods import METHODS, options_of
    from conadv_lab.recipes import RECIPES

    methods = {name: [f"{method.about}.", *_wrapped(options_of(name))] for name, method in METHODS.items()}
    for word in words:
        if word not in ("methods", "recipes"):
            raise unknown("list", word, ("methods", "recipes"))
    told = methods if "methods" in words else {name: [_sentence(recipe)] for name, recipe in RECIPES.items()}
    width = max(map(len, told))
    for name, lines in told.items():
        for number, line in enumerate(lines):
            print(f"{'' if number else name:{width}}  {line}")
    return 0


def _wrapped(options: list[str]) -> list[str]:
    return textwrap.wrap(
        " ".join(options), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _sentence(recipe: Callable[[], Config]) -> str:
    return (recipe.__doc__ or "").strip().splitlines()[0]


def _train(config: Config, out: Path, resume: bool) -> int:
    from conadv_lab.training.distributed import AnotherRankFailed
    from conadv_lab.training.finite import NotFinite
    from conadv_lab.training.loop import StoppedOnRequest, prepare

    try:
        run = prepare(config, out, resume=resume)
    except ValueError as mistake:
        _tell(mistake)
        return 2
    except (OSError, AnotherRankFailed) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if run is None and _is_first():
        print(f"{out} is finished; nothing to do", file=sys.stderr)
    try:
        if run is not None:
            _warn_of_photographs_without_a_gpu(run.config, run.parts.device.type)
            run.to_the_end()
    except StoppedOnRequest as stop:
        if _is_first():
            print(stop, file=sys.stderr)
            print(out)
        return 75
    except OSError as failure:  # on this rank alone
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except (NotFinite, AnotherRankFailed) as failure:
        _tell(failure)
        return 1
    if _is_first():
        print(out)
    return 0


def _warn_of_photographs_without_a_gpu(config: Config, device: str) -> None:
    """Warn before the first step, which may take minutes."""
    if device != "cpu" or not config.data.source.photographs or config.data.pixels < 128 or not _is_first():
        return
    slower = ", and --precision float32 if this CPU has no fast bfloat16" * (
        config.model.precision == "bfloat16"
    )
    print(
        f"warning: training on photographs of {config.data.pixels} pixels without a GPU; a step may take minutes. "
        f"Try a smaller --pixels and --global-batch{slower}; --plan predicts time on GPUs",
        file=sys.stderr,
        flush=True,
    )


def _tell(what: Exception) -> None:
    """Print an error once, though several ranks may raise it."""
    if _is_first():
        print(f"error: {what}", file=sys.stderr)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
