"""What the command measures: a run folder, one of its checkpoints, or a user's function."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from conadv_lab.mistakes import require, require_count
from conadv_lab.sharpness.problem.checks import reusable
from conadv_lab.sharpness.problem.problem import Batch, Criterion

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Subject:
    """A model with its loss and data.

    Attributes:
        name: its name in reports.
        batches: ``(inputs, targets)`` pairs.
        facts: metadata from its source, recorded in the conditions of every number.
    """

    name: str
    model: nn.Module
    criterion: Criterion
    batches: Any
    facts: Mapping[str, Any]


def load(
    place: str, *, examples: int = 1000, batch_size: int = 250, split: str = "train", trust: bool = False
) -> Subject:
    """A run folder, a checkpoint folder ``…/checkpoints/step_…``, or ``path/to/file.py:function``.

    The function takes no arguments and returns ``(model, criterion, batches)``, optionally followed by a mapping of
    facts such as ``{"split": "train", "learning_rate": 0.1}``. For a run we use its first images without augmentation
    and re-estimate the main statistics as for its own metrics. Python files that the run's config names only run
    with ``trust``.

    Raises:
        ValueError: no such path, a checkpoint that does not match the model, untrusted code, or a function with
            another return value.
    """
    require(split in SPLITS, "split", split, "'train' or 'test'")
    require_count(examples=examples, batch_size=batch_size)
    path = Path(place)
    if path.is_dir():
        is_checkpoint = (path / "COMMIT.json").is_file()
        run = path.parent.parent if is_checkpoint else path
        return _run(place, run, path if is_checkpoint else None, examples, batch_size, split, trust)
    if ".py:" in place:
        return _function(place)
    raise ValueError(
        f"{place!r} is not a run folder; allowed: a run folder, a checkpoint folder or path/to/file.py:function"
    )


def _function(place: str) -> Subject:
    from conadv_lab.references import load as named

    function = named(place)
    require(callable(function), place, type(function).__name__, "a function that takes no arguments")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], nn.Module):
        raise ValueError(
            f"{place} returned {type(made).__name__}; allowed: (model, criterion, batches[, facts])"
        )
    facts: Mapping[str, Any] = made[3] if len(made) == 4 else {}
    return Subject(place, made[0], made[1], reusable(made[2]), {"subject": place, **facts})


def _run(
    place: str, run: Path, checkpoint: Path | None, examples: int, batch_size: int, split: str, trust: bool
) -> Subject:
    from conadv_lab.config import resolved
    from conadv_lab.runs import RunFolder
    from conadv_lab.training.evaluate import fixed_images, statistics_used
    from conadv_lab.training.restore import restore

    folder = RunFolder(run)
    parts, model = restore(run, checkpoint, trust=trust)
    images, labels = fixed_images(parts.train_set if split == "train" else parts.test_set, examples)
    batches: list[Batch] = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    config, result = resolved(folder.config()), folder.result() or {}
    facts = {
        "subject": place,
        "split": split,
        "augmentation": "none",
        "learning_rate": config.optimization.lr,
        "label_smoothing": config.optimization.label_smoothing,
        "weight_decay_inside": False,
        "bn_recalibrated_on": min(config.training.bn_recalibrate, len(parts.train_set)),
        "bn_statistics": statistics_used(parts),
        "method": config.method.method,
        "global_batch": config.training.global_batch,
        "run_seed": config.training.seed,
    }
    figures = {
        k: result[k] for k in ("test_accuracy", "train_test_gap") if checkpoint is None and k in result
    }
    return Subject(place, model, parts.criterion, batches, facts | figures)
