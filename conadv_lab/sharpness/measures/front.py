"""``measure``: the curvature and sharpness of a model, each number with its error, cost and conditions."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conadv_lab.mistakes import unknown
from conadv_lab.sharpness.measures import (  # noqa: F401 - they fill the registry
    average,
    gradients,
    images,
    keskar,
    landscape,
    layers,
    of_hessian,
    worst,
)
from conadv_lab.sharpness.measures.progress import Progress
from conadv_lab.sharpness.measures.results import Measure, Report
from conadv_lab.sharpness.measures.study import REGISTRY, RESCALING, Settings, Study
from conadv_lab.sharpness.problem.arithmetic import full_float32
from conadv_lab.sharpness.problem.classes import require_meaning
from conadv_lab.sharpness.problem.precision import under
from conadv_lab.sharpness.problem.problem import Batch, Criterion, Problem
from conadv_lab.sharpness.spectrum.journal import Journal

DEFAULT = (
    "top_eigenvalue", "trace", "ggn_trace", "sam_average", "adaptive_average", "batch_sharpness",
)  # fmt: skip
"""What ``measure`` computes by default: defined for any model and loss, about 65 gradients (:mod:`~.progress`).

Worst cases, densities and searches cost 50 to 130 gradients each, and have to be requested by name.
"""


def measure(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch] | Batch,
    measures: Sequence[str] = DEFAULT,
    *,
    seed: int = 0,
    params: Sequence[str] | None = None,
    bn: str = "eval",
    dtype: torch.dtype | None = None,
    all_reduce: bool = False,
    facts: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
    shown: Callable[[Measure], None] | None = None,
    refused: Callable[[str, ValueError], None] | None = None,
    **settings: Any,
) -> Report:
    """Measure how flat a minimum is, without changing a bit of the model or the global random state.

    Args:
        model, criterion, batches, params, bn, dtype, all_reduce: see `Problem`.
        measures: names; :func:`names` lists them.
        seed: of start vectors, probes and perturbations; same seed, same bits on one machine.
        facts: metadata that cannot be inferred and is recorded with every number: ``split``, ``augmentation``,
            ``learning_rate``, ``weight_decay_inside``.
        resume: a folder that stores finished measures; a second call with it continues from there.
        progress: print one line per measure with the time left to standard error.
        shown: called with each measure as soon as it is done.
        refused: called with the name and error of a measure that is undefined for this model, which is then skipped;
            ``None`` raises the error.
        settings: fields of :class:`~.study.Settings`.

    Raises:
        ValueError: an invalid argument; the message says what is allowed.

    >>> torch.manual_seed(0) and None
    >>> model = nn.Linear(4, 3)
    >>> batch = (torch.randn(20, 4), torch.randint(0, 3, (20,)))
    >>> report = measure(model, nn.CrossEntropyLoss(), batch, measures=("top_eigenvalue",))
    >>> report["top_eigenvalue"].value > 0
    True
    """
    measures = (measures,) if isinstance(measures, str) else tuple(measures)
    for name in measures:
        if name not in REGISTRY:
            raise unknown("measure", name, REGISTRY)
    chosen = Settings.of(**settings)
    began = time.perf_counter()
    problem = Problem(
        model, criterion, batches, params=params, bn=bn, dtype=dtype, all_reduce=all_reduce, seed=seed
    )
    measures = tuple(name for name in measures if _has_meaning(problem, name, refused))
    order = sorted(measures, key=_order)
    told = Progress(order, time.perf_counter() - began, progress)
    journal = Journal(resume, _key(problem, chosen, seed) | {"facts": dict(facts or {})})
    study = Study(problem, chosen, seed, dict(facts or {}), journal, told.product)
    results = []
    with told:
        for name in order:
            told.begin()
            try:
                found = _one(study, name)
            except ValueError as mistake:
                if refused is None:
                    raise
                refused(name, mistake)
                continue
            told.end()
            results.append(found)
            if shown:
                shown(found)
    return Report(tuple(sorted(results, key=lambda m: measures.index(m.name))))


def names() -> list[str]:
    """All available measures.

    >>> "top_eigenvalue" in names()
    True
    """
    return sorted(REGISTRY)


def _has_meaning(problem: Problem, name: str, refused: Callable[[str, ValueError], None] | None) -> bool:
    try:
        require_meaning(problem, name)
    except ValueError as mistake:
        if refused is None:
            raise
        refused(name, mistake)
        return False
    return True


def _order(name: str) -> int:
    """Longer results first, so that the top eigenvalue is read off the top k."""
    return 1 if name == "top_eigenvalue" else 0


def _one(study: Study, name: str) -> Measure:
    kept = study.journal.get(f"measure-{name}")
    if kept is not None:
        return Measure(**kept)
    start = time.perf_counter()
    with full_float32(), under(None, study.problem.device):
        outcome = REGISTRY[name](study)
    seconds = time.perf_counter() - start
    conditions = study.conditions() | {"under_rescaling": RESCALING[name]} | dict(outcome.conditions or {})
    result = Measure(name, outcome.value, outcome.error, outcome.products, seconds, conditions)
    study.journal.put(f"measure-{name}", vars(result))
    return result


def _key(problem: Problem, settings: Settings, seed: int) -> dict[str, Any]:
    """What identifies a measurement when it is resumed."""
    weights = problem.weights().double()
    places = torch.arange(len(weights), device=weights.device)
    mark = [float(weights.sum()), float(weights.norm()), float((weights * places).sum())]
    return {
        "weights": mark, "data": problem.data_hash, "settings": vars(settings), "seed": seed,
        "bn": problem.bn, "names": problem.names, "precision": f"torch.{problem.arithmetic}",
        # Detects another criterion, architecture or buffers; rounded, as the thread count changes the order of sums.
        "loss": f"{problem.initial_loss:.3g}", "slope": f"{float(problem.gradient.norm()):.3g}",
    }  # fmt: skip
