"""What a stale attack costs, and what it buys.

``simulate(cluster, recipe, method, devices=…)`` returns a table of step times, staleness and device-hours. Names load
on first use; nothing of the timeline needs torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "best": "simulation",
    "Cluster": "cluster",
    "load_cluster": "cluster",
    "one_timeline": "simulation",
    "simulate": "simulation",
    "Timeline": "timeline",
    "Workload": "workload",
    "WORKLOADS": "workload",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = import_module(f"conadv_lab.staleness.{_HOMES[name]}")
        return getattr(module, "load" if name == "load_cluster" else name)
    raise AttributeError(
        f"module 'conadv_lab.staleness' has no attribute {name!r}; it offers {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
