"""What stale attacks cost, and what they gain.

``simulate(cluster, recipe, method, devices=…)`` returns a table of step times, staleness and device-hours,
``study(config, draws)`` one of real training with stale attacks. Names load on first use; the timeline does not need
torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "best": "timeline.simulation",
    "Cluster": "timeline.cluster",
    "Draw": "draws",
    "load_cluster": "timeline.cluster",
    "one_timeline": "timeline.simulation",
    "read_trace": "draws",
    "simulate": "timeline.simulation",
    "study": "dynamics.study",
    "Timeline": "timeline.recursion",
    "Workload": "timeline.workload",
    "WORKLOADS": "timeline.workload",
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
