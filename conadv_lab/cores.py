"""How many cores this process may use; nothing here imports torch."""

import os
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Number of cores that affinity and cgroup limits leave to this process, at least 1.

    A limit of 2.5 cores counts as 2: with more threads the process would be throttled in the middle of a step.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    """The limits, in cores, of this process's cgroups and their parents (Linux, cgroup v2 and v1).

    Source: Linux kernel, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        inner = Path(group.lstrip("/"))
        # In a container the path may be the host's and not exist here; the mounted root is then the container's own.
        for folder in (mounted / inner, *(mounted / above for above in inner.parents)):
            found += _limit(folder)
    return found


def _limit(folder: Path) -> list[float]:
    """A cgroup's limit in cores, or none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError):  # no such file, or "max"
        return []
