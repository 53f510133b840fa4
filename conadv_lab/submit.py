"""Send runs to SLURM, or run them here: ``python -m conadv_lab.submit VERB …``."""

import sys
from collections.abc import Callable, Sequence

from conadv_lab.mistakes import unknown, warnings_in_a_line
from conadv_lab.pipes import outlive_readers

USAGE = """usage: python -m conadv_lab.submit VERB ...

  run RECIPE --out DIR [--profile NAME] [--dry-run] [--field value ...]     one run
  sweep RECIPE --out DIR [...] [--field value,value ...]                    every combination, one folder per run
  status DIR ...                       one row per run, with its state
  logs RUN                             the end of a run's output
  cancel DIR ...                       cancel pending and running runs; checkpoints are kept
  retry DIR ... [--failed]             resend runs that ended unfinished; they continue where they stopped
  collect DIR ... [--csv FILE]         configs and results as a table
  show RUN [--reproduce]               where a run came from; the command that repeats it

VERB --help lists the options of a verb. RECIPE is a name or path/to/file.py:function; for a sweep the function may
return a list of configs. Without --profile, runs go to SLURM if it is installed, otherwise they run on this machine.
Exit status: 0 finished or queued, 2 invalid arguments, 1 failure, 75 stopped on request and resumable.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    warnings_in_a_line()
    try:
        return _verb(words[0])(words[1:])
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except ConnectionError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


def _verb(name: str) -> Callable[[list[str]], int]:
    verbs = ("run", "sweep", "status", "logs", "cancel", "retry", "collect", "show")
    if name not in verbs:
        raise unknown("verb", name, verbs)
    from conadv_lab.launch import commands

    return getattr(commands, name)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
