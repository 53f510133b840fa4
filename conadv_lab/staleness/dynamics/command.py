"""The command: real training with stale attacks, or the same on the quadratic problem.

``python -m conadv_lab.staleness dynamics [RECIPE | quadratic] [--taus 0 1 4 16] [--field value …]``
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from conadv_lab.config import Config
from conadv_lab.mistakes import warnings_in_a_line
from conadv_lab.outputs import Outputs
from conadv_lab.recipes import digits
from conadv_lab.staleness.dynamics.frame import print_table
from conadv_lab.staleness.dynamics.options import QuadraticOptions, RunOptions
from conadv_lab.staleness.dynamics.study import study

if TYPE_CHECKING:
    import pandas as pd

USAGE = """usage: python -m conadv_lab.staleness dynamics [RECIPE] [--taus T ...] [--draw KIND] [--field value ...]
       python -m conadv_lab.staleness dynamics quadratic [--taus T ...] [--lr LR] ...
       python -m conadv_lab.staleness dynamics RECIPE --help     every option, with its default

RECIPE is a recipe's name or path/to/file.py:function; without one, digits-conadv with 16 epochs.
Exit status: 0 success, 2 invalid arguments, 1 failure.
"""
PROBE_EVERY = 10
"""Default number of steps between comparisons of stale and fresh attacks."""


def small() -> Config:
    """Digits, ConAdv at batch 256 for 16 epochs: the command's default, in under a minute."""
    return digits.conadv().replace(epochs=16, probe_every=4)


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    words = list(words)
    warnings_in_a_line()
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    try:
        frame, outputs = _quadratic(words) if name == "quadratic" else _training(name, words)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    from conadv_lab.staleness.dynamics import figures

    print_table(frame)
    outputs.write(frame)
    outputs.write_figure(lambda: figures.page(frame))
    return 0


def _quadratic(words: list[str]) -> "tuple[pd.DataFrame, Outputs]":
    from conadv_lab.cli import parsed

    asked = parsed(QuadraticOptions, words, "conadv_lab.staleness dynamics quadratic")
    asked.files.require_writable()
    from conadv_lab.staleness.dynamics import on_quadratic

    return on_quadratic.study(asked.draws(), asked), asked.files


def _training(name: str, words: list[str]) -> "tuple[pd.DataFrame, Outputs]":
    from conadv_lab.cli import parse_config
    from conadv_lab.recipes import find

    recipe = _probed(find(name)) if name else small
    prog = f"conadv_lab.staleness dynamics {name or 'digits-conadv'}"
    if any(word.partition("=")[0] == "--staleness" for word in words):
        raise ValueError("unknown option --staleness of dynamics; use --taus, such as --taus 0 1 4")
    config, asked = parse_config(recipe, words, prog=prog, options=RunOptions())
    asked.files.require_writable()
    return study(
        config, asked.draws(), seeds=asked.seeds, curvature_images=asked.curvature_images,
        problem=name or "digits-conadv", progress=True,
    ), asked.files  # fmt: skip


def _probed(recipe: Callable[[], Config]) -> Callable[[], Config]:
    """The recipe, with regular comparisons of stale and fresh attacks."""

    def probed() -> Config:
        config = recipe()
        return config.replace(probe_every=config.training.probe_every or PROBE_EVERY)

    probed.__doc__ = recipe.__doc__
    return probed
