"""The final metrics of a run, as stored in ``result.json``."""

from statistics import fmean
from typing import Any

from conadv_lab.methods.base import Method
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import Parts
from conadv_lab.training.evaluate import statistics_used
from conadv_lab.training.overfitting import KEY, first_told
from conadv_lab.training.weights import parameters_sha256


def result_of(
    parts: Parts, folder: RunFolder, figures: dict[str, float], steps: int, seconds: float
) -> dict[str, Any]:
    """The final evaluation's metrics, the images seen, the cost, and a hash of the parameters."""
    training = parts.config.training
    images = parts.stream.first_place(steps)
    result = figures | {
        "steps": steps,
        "epochs_seen": images / len(parts.train_set),
        "clean_images": round(images / max(1, parts.method.new_fraction)),
        **_costs(parts.method, steps),
        **{f"method_{name}": getattr(parts.method, name) for name in ("label", "colour", "marker")},
        "seconds": seconds,
        "bn_recalibrated_on": min(training.bn_recalibrate, len(parts.train_set)),
        "bn_statistics": statistics_used(parts),
        "parameters_sha256": parameters_sha256(parts.model),
    }
    if training.pgd_images and parts.method.single_step:
        result[f"{KEY}_step"] = first_told([*folder.metrics(), {"step": steps - 1} | figures])
    if isinstance(parts.schedule, AutoWU):
        result |= parts.schedule.figures()
    return result


def _costs(method: Method, steps: int) -> dict[str, float]:
    """Mean cost and depth of the run's steps, and the number of skipped steps if there were any."""
    each = [method.step_cost(number, steps) for number in range(steps)]
    told: dict[str, float] = {}
    for name, values in zip(("gradient_evaluations", "depth"), zip(*each, strict=True), strict=True):
        told[name] = values[0] if len(set(values)) == 1 else fmean(values)
    return told | ({"steps_left_out": method.left_out} if method.left_out else {})
