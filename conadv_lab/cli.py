"""Turning words of a command line into a config: every field an option, its default the recipe's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import tyro

from conadv_lab.config import Config


@dataclass(frozen=True)
class Options:
    """Of this command"""

    out: Path | None = None
    """The run folder; None: runs/RECIPE-METHOD-bBATCH-sSEED."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint."""
    ranks: int = 1
    """Train with so many processes of this machine, which share every step; torchrun and submit start their own."""
    plan: bool = False
    """Print memory, network and time that step and run are predicted to take on --devices, and train nothing."""
    devices: int = 1
    """How many devices share a step, attackers among them, for --plan."""


def parse_config(
    recipe: Callable[[], Config], words: Sequence[str], prog: str, options: Any = None
) -> tuple[Config, Any]:
    """The recipe's config with the options among ``words`` applied, and the command's own options.

    Raises:
        SystemExit: status 2 with the parser's message, or 0 after ``--help``.
    """
    own = options or Options()
    command = make_dataclass(
        "Command",
        [
            ("options", type(own), field(default_factory=lambda: own)),
            ("config", Config, field(default_factory=recipe)),
        ],
        frozen=True,
    )
    parsed: Any = tyro.cli(
        command,
        args=list(words),
        prog=prog,
        description=recipe.__doc__ or "",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.config, parsed.options
