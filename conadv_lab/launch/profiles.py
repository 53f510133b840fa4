"""Site profiles: a cluster's settings, in one small TOML file per site.

``--profile NAME`` looks for NAME.toml in ``$CONADV_PROFILES``, ``~/.config/conadv_lab/profiles`` and, in a
checkout, ``slurm/profiles``; it also takes the path of a TOML file. Two profiles need no file: ``local``, this
machine through submitit's local executor, and ``slurm``, the cluster's default partition.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conadv_lab import reading
from conadv_lab.mistakes import ABOVE_0, COUNT, COUNT_OR_0, require, require_ranges, unknown

BUILT_IN = ("local", "slurm")


@dataclass(frozen=True)
class Profile:
    """One site. Times are in minutes or seconds as named, memory in GiB per node; None leaves it to the site."""

    name: str = "slurm"
    executor: str = "slurm"
    """slurm, or local: this machine."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    """Ranks per node."""
    cpus_per_task: int = 1
    """CPUs per rank; the worker refuses to run with fewer."""
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    minutes: int = 60
    """Time limit of one attempt; a run that reaches it saves, is requeued, and continues."""
    signal_delay_s: int | None = None
    """How many seconds before the limit the run is told to save; None: a quarter of the limit, at most 120."""
    max_parallel: int = 64
    """How many runs of a sweep may run at once."""
    max_array: int | None = None
    """Largest job array the site allows; None: what SLURM reports, or 1001 without SLURM."""
    setup: tuple[str, ...] = ()
    """Shell lines before the run, such as ``module load cuda``."""
    container: str | None = None
    """Command to put before python, such as ``apptainer exec --nv image.sif``."""
    python: str | None = None
    """Python to use on the nodes; None: the one that submits."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any further sbatch options, such as ``{reservation = "maintenance"}``."""

    @property
    def is_local(self) -> bool:
        return self.executor == "local"

    @property
    def delay(self) -> int:
        """Seconds of notice before the time limit."""
        return self.signal_delay_s if self.signal_delay_s is not None else min(120, self.minutes * 15)

    def replace(self, **changes: Any) -> "Profile":
        """A validated copy with these values; None leaves a value unchanged."""
        given = {key: value for key, value in changes.items() if value is not None}
        return _checked(dataclasses.replace(self, **given))


_LOCAL = Profile(name="local", executor="local", minutes=525_600)


def load(name: str) -> Profile:
    """Load the profile with this name or from this TOML file.

    Raises:
        ValueError: no such profile, an unknown key in it, or an impossible value.
    """
    if name.endswith(".toml"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(f"profile {name!r} does not exist; allowed: a name, or a path to a TOML file")
        return _read(file)
    for folder in folders():
        if (folder / f"{name}.toml").is_file():
            return _read(folder / f"{name}.toml")
    if name not in BUILT_IN:
        own = "Yours is a file NAME.toml in ~/.config/conadv_lab/profiles"
        raise ValueError(f"{unknown('profile', name, names())} {own}")
    return _LOCAL if name == "local" else Profile()


def names() -> list[str]:
    """The names of all profiles available here."""
    return sorted({*BUILT_IN, *(file.stem for folder in folders() for file in folder.glob("*.toml"))})


def folders() -> Iterator[Path]:
    """Where profiles are looked up, in this order."""
    if own := os.environ.get("CONADV_PROFILES"):
        yield Path(own).expanduser()
    yield Path("~/.config/conadv_lab/profiles").expanduser()
    yield Path(__file__).resolve().parents[2] / "slurm" / "profiles"


def from_dict(values: Mapping[str, Any], where: str) -> Profile:
    """A validated profile from plain values, such as TOML or JSON; ``where`` names their source in errors."""
    return _checked(reading.read(Profile, values, where))


def _read(file: Path) -> Profile:
    return from_dict({"name": file.stem, **reading.toml(file.read_text(), str(file))}, str(file))


def _checked(profile: Profile) -> Profile:
    require(profile.executor in ("slurm", "local"), "executor", profile.executor, "slurm, local")
    names = ("nodes", "tasks_per_node", "cpus_per_task", "minutes", "max_parallel", "max_array")
    require_ranges(profile, **dict.fromkeys(names, COUNT), mem_gb=ABOVE_0, gpus_per_node=COUNT_OR_0)
    limit = profile.minutes * 60
    require(
        0 < profile.delay < limit, "signal_delay_s", profile.delay, f"1 to {limit - 1}, within the time limit"
    )
    require(not profile.is_local or profile.nodes == 1, "nodes", profile.nodes, "1 on this machine")
    return profile
