"""What is measured for one run: its final figures and its flatness."""

import json
from pathlib import Path
from typing import Any

from conadv_lab.config import Config, resolved
from conadv_lab.files import write_json

CURVATURE_IMAGES = 256
NOISE_GROUP = 32
ADAPTIVE_RHO, RELATIVE_RHO = 1.0, 0.1
MEASURES = (
    "top_eigenvalue",
    "trace",
    "adaptive_worst",
    "adaptive_worst_logit_normalised",
    "adaptive_average",
)


def trained(config: Config, path: Path) -> dict[str, Any]:
    """Train at ``path``, or continue there, and return the run's final figures."""
    from conadv_lab.training.loop import train

    return train(config, path, resume=True, progress="none").result() or {}


def attempted(config: Config, path: Path) -> dict[str, Any]:
    """As `trained`; a run that diverges counts as 0 % accurate, with a loss worse than any other."""
    from conadv_lab.training.finite import NotFinite

    try:
        return trained(config, path)
    except NotFinite:
        none = {"test_accuracy": 0.0, "train_accuracy": 0.0, "test_loss": 1e9, "train_loss": 1e9}
        return none | {"steps": config.training.steps, "diverged": True}


def measured(config: Config, path: Path) -> dict[str, Any]:
    """Train and measure the flatness of the training loss on its first 256 images, without augmentation."""
    figures = trained(config, path)
    found = flatness(path)
    rate = resolved(config).optimization.lr or 0.0
    return figures | found | {"lr_times_eigenvalue": rate * found["top_eigenvalue"]}


def measured_without_trace(config: Config, path: Path) -> dict[str, Any]:
    """As `measured`, without the trace, which needs hundreds of products where activations are smooth."""
    measures = tuple(name for name in MEASURES if name != "trace")
    return trained(config, path) | flatness(path, measures)


def flatness(path: Path, measures: tuple[str, ...] = MEASURES) -> dict[str, float]:
    """The measures of a finished run, one number each; the whole report stays in ``sharpness.json``."""
    import torch

    from conadv_lab import sharpness
    from conadv_lab.training.evaluate import fixed_images
    from conadv_lab.training.restore import restore

    file = path / "sharpness.json"
    if not file.exists():
        parts, judged = restore(path)
        # Measure with the run's own thread count, which the tables' manifests state.
        torch.set_num_threads(parts.config.training.threads or torch.get_num_threads())
        facts = {"split": "train", "augmentation": "none", "learning_rate": parts.config.optimization.lr}
        batch = fixed_images(parts.train_set, CURVATURE_IMAGES)
        report = sharpness.measure(
            judged, parts.criterion, [batch], measures, facts=facts,
            adaptive_rhos=(ADAPTIVE_RHO,), relative_rhos=(RELATIVE_RHO,),
        )  # fmt: skip
        write_json(file, report.to_dict())
    found = {}
    for measure in json.loads(file.read_text())["measures"]:
        value = measure["value"]
        found[measure["name"]] = next(iter(value.values())) if isinstance(value, dict) else value
    return found


def noise_scale(path: Path) -> float:
    """The gradient noise scale (images) of a finished run's training loss, from groups of 32 images."""
    from conadv_lab import sharpness
    from conadv_lab.training.evaluate import fixed_images
    from conadv_lab.training.restore import restore

    parts, judged = restore(path)
    batch = fixed_images(parts.train_set, len(parts.train_set))
    report = sharpness.measure(judged, parts.criterion, [batch], ("gradient_noise_scale",), m=NOISE_GROUP)
    return float(report["gradient_noise_scale"].value)
