"""The options of ``submit run`` and ``sweep`` beside the config's fields."""

from dataclasses import dataclass
from pathlib import Path

from conadv_lab.launch import profiles, slurm
from conadv_lab.launch.profiles import Profile

SLURM_ALONE = ("partition", "account", "qos", "constraint", "gres")
"""What sbatch takes as it is, and this machine without SLURM has not."""


@dataclass(frozen=True)
class RunOptions:
    """Where runs go, and settings of the profile to override"""

    out: Path | None = None
    """The run folder, or the folder of the sweep's run folders."""
    profile: str | None = None
    """A site profile (see docs/slurm.md); None: slurm if it is installed, else local."""
    dry_run: bool = False
    """Print the config, the table of runs and the sbatch script as they would be sent, and write nothing."""
    data_on_nodes: bool = False
    """Only the nodes can see the data: skip the checks that need them before runs are sent."""
    partition: str | None = None
    """SLURM partition; None: the profile's."""
    account: str | None = None
    """SLURM account; None: the profile's."""
    qos: str | None = None
    """Quality of service; None: the profile's."""
    constraint: str | None = None
    """Features that the nodes must have; None: the profile's."""
    gres: str | None = None
    """Generic resources of each node, such as gpu:h100:4; None: the profile's."""
    nodes: int | None = None
    """Nodes; None: the profile's."""
    tasks_per_node: int | None = None
    """Ranks on each node; None: the profile's."""
    cpus_per_task: int | None = None
    """CPUs of each rank; None: the profile's."""
    gpus_per_node: int | None = None
    """GPUs on each node; None: the profile's."""
    mem_gb: float | None = None
    """Memory of each node in GiB; None: the profile's."""
    minutes: int | None = None
    """Time limit of a job in minutes; None: the profile's."""
    signal_delay_s: int | None = None
    """Seconds before the time limit at which the run is told to save; None: the profile's."""
    max_parallel: int | None = None
    """Most runs of a sweep at the same time; None: the profile's."""

    def site(self) -> Profile:
        """The profile with the changes.

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
    """``slurm`` where this machine can send to one, else ``local``."""
    return "slurm" if slurm.is_here() else "local"
