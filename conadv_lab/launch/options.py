"""The options of ``submit run`` and ``sweep`` besides the config's fields."""

from dataclasses import dataclass
from pathlib import Path

from conadv_lab.launch import profiles, slurm
from conadv_lab.launch.profiles import Profile

SLURM_ALONE = ("partition", "account", "qos", "constraint", "gres")
"""Passed on to sbatch unchanged; without SLURM there is no such thing."""


@dataclass(frozen=True)
class RunOptions:
    """Where the runs go, and overrides of the profile"""

    out: Path | None = None
    """The run folder, or the folder that will hold the sweep's runs."""
    profile: str | None = None
    """Site profile (see docs/slurm.md); None: slurm if it is installed, else local."""
    dry_run: bool = False
    """Print the config, the runs and the sbatch script exactly as they would be sent; write nothing."""
    data_on_nodes: bool = False
    """The data are visible on the nodes only: skip the checks that need them."""
    partition: str | None = None
    """SLURM partition; None: the profile's."""
    account: str | None = None
    """SLURM account; None: the profile's."""
    qos: str | None = None
    """Quality of service; None: the profile's."""
    constraint: str | None = None
    """Node features to require; None: the profile's."""
    gres: str | None = None
    """Generic resources per node, such as gpu:h100:4; None: the profile's."""
    nodes: int | None = None
    """Number of nodes; None: the profile's."""
    tasks_per_node: int | None = None
    """Ranks per node; None: the profile's."""
    cpus_per_task: int | None = None
    """CPUs per rank; None: the profile's."""
    gpus_per_node: int | None = None
    """GPUs per node; None: the profile's."""
    mem_gb: float | None = None
    """Memory per node in GiB; None: the profile's."""
    minutes: int | None = None
    """Time limit per job in minutes; None: the profile's."""
    signal_delay_s: int | None = None
    """How many seconds before the time limit the run is told to save; None: the profile's."""
    max_parallel: int | None = None
    """How many runs of a sweep may run at once; None: the profile's."""

    def site(self) -> Profile:
        """The profile with the overrides applied.

        Raises:
            ValueError: an unknown profile or an impossible value.
        """
        chosen = profiles.load(self.profile or default_profile())
        if chosen.is_local:
            for name in (*SLURM_ALONE, "mem_gb", "data_on_nodes"):
                if (value := getattr(self, name)) not in (None, False):
                    why = f"profile {chosen.name} runs on this machine" + (
                        "" if self.profile else ": no SLURM here"
                    )
                    raise ValueError(f"{name} is {value!r}; allowed: only on SLURM ({why})")
        names = (*SLURM_ALONE, "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "minutes",
                 "signal_delay_s", "max_parallel")  # fmt: skip
        return chosen.replace(**{name: getattr(self, name) for name in names})


def default_profile() -> str:
    """``slurm`` where this machine can submit to SLURM, else ``local``."""
    return "slurm" if slurm.is_here() else "local"
