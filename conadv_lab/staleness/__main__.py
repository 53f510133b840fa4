"""The staleness simulator: ``python -m conadv_lab.staleness VERB …``."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from conadv_lab.mistakes import unknown
from conadv_lab.pipes import outlive_readers

USAGE = """usage: python -m conadv_lab.staleness VERB ...

  timeline   step time, utilisation, effective staleness and cost of a recipe on a cluster, as a table
  fit        constants of the H100 and A100 clusters, fitted to MLPerf's step times, and their residuals
  report     a page: what-if table, charts of the steps, step time and speed-up, the fit
  clusters   the built-in clusters, one per line
  dynamics   real training with stale perturbations
  theory     the bound on the quadratic problem, compared with measurements

VERB --help lists the options of a verb; the default verb is timeline. Exit status: 0 success,
2 invalid arguments, 1 failure.
"""
VERBS = {
    "timeline": "timeline.commands",
    "fit": "timeline.commands",
    "report": "report.command",
    "clusters": "timeline.commands",
    "dynamics": "dynamics.command",
    "theory": "theory.command",
}
"""Each verb's module; a module with several verbs has a function per verb, the others have ``main``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0].startswith("-"):
        words.insert(0, "timeline")
    try:
        return _verb(words[0])(words[1:])
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


def _verb(name: str) -> Callable[[list[str]], int]:
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    module = import_module(f"conadv_lab.staleness.{VERBS[name]}")
    verb: Callable[[list[str]], int] = getattr(module, name if VERBS[name] == "timeline.commands" else "main")
    return verb


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
