"""The command that reproduces a run."""

import shlex
from pathlib import Path
from typing import Any

from conadv_lab.config import Config
from conadv_lab.launch.records import Record
from conadv_lab.runs import RunFolder


def command(run: Path) -> str:
    """A shell command that trains the run's config again, into a folder beside it, with the code it ran with.

    Raises:
        ValueError: the folder is not a run, or was never started.
    """
    record, folder = Record(run.absolute()), RunFolder(run)
    config = folder.config() if (run / "config.json").is_file() else Config.from_dict(record.job["config"])
    recipe = record.job["recipe"] if record.exists else "digits-vanilla"
    words = [
        "python",
        "-m",
        "conadv_lab.train",
        "digits-vanilla",
        *options(config),
        "--out",
        f"{run.absolute()}-again",
    ]
    lines = []
    if (run / "manifest.json").is_file():
        manifest = folder.manifest()
        if (
            count := manifest.get("ranks", 1)
        ) > 1:  # attackers need them, and the number of trainers changes bits
            words += ["--ranks", str(count)]
        packages = " ".join(f"{name}=={version}" for name, version in manifest["packages"].items() if version)
        lines = [f"# recipe {recipe}, commit {manifest['commit']}, data {manifest['data']}",
                 f"# python {manifest['python']}, {packages}"]  # fmt: skip
    if record.exists:
        lines.append(f"cd {shlex.quote(record.job['folder'])}")
        words = ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={record.job['snapshot']['path']}", *words]
    return "\n".join([*lines, shlex.join(words)])


def options(config: Config) -> list[str]:
    """Every field of a config as command-line options, so that no recipe's defaults matter."""
    words: list[str] = []
    for section in config.to_dict().values():
        for name, value in section.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *_values(value)]
    return words


def _values(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return [str(value)]
