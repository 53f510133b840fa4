"""``measure``: the curvature and sharpness of a model, each number with its error, price and conditions."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from conadv_lab.mistakes import unknown
from conadv_lab.sharpness import (  # noqa: F401 - they fill the registry
    average,
    gradients,
    images,
    keskar,
    landscape,
    layers,
    spectrum,
    worst,
)
from conadv_lab.sharpness.classes import meaningful
from conadv_lab.sharpness.journal import Journal
from conadv_lab.sharpness.precision import under
from conadv_lab.sharpness.problem import Batch, Criterion, Problem
from conadv_lab.sharpness.results import Measure, Report
from conadv_lab.sharpness.study import REGISTRY, RESCALING, Settings, Study

DEFAULT = (
    "top_eigenvalue", "top_eigenvalues", "bottom_eigenvalue", "trace", "ggn_trace", "density", "sam_worst",
    "sam_average", "adaptive_worst", "adaptive_average", "adaptive_worst_logit_normalised", "batch_sharpness",
)  # fmt: skip
"""What ``measure`` gives unasked: any model and loss have it, but that normalised logits need classes."""


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
    **settings: Any,
) -> Report:
    """Measure how flat a model lies, without changing it: not a bit of it, nor the global random state.

    Args:
        model, criterion, batches, params, bn, dtype, all_reduce: see :class:`~.problem.Problem`.
        measures: names; :func:`names` lists them.
        seed: of start vectors, probes and perturbations; same seed, same bits on one machine.
        facts: what only the caller knows and every number should carry: ``split``, ``augmentation``,
            ``learning_rate``, ``weight_decay_inside``.
        resume: a folder in which finished measures are kept; a second call with it goes on from there.
        progress: show a bar.
        settings: fields of :class:`~.study.Settings`.

    Raises:
        ValueError: a mistake in the arguments, told with what is allowed.

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
    problem = Problem(
        model, criterion, batches, params=params, bn=bn, dtype=dtype, all_reduce=all_reduce, seed=seed
    )
    measures = meaningful(problem, measures, DEFAULT)
    journal = Journal(resume, _key(problem, chosen, seed) | {"facts": dict(facts or {})})
    with tqdm(total=len(measures), disable=not progress, unit="measure", delay=1) as bar:
        study = Study(problem, chosen, seed, dict(facts or {}), journal, lambda: _count_in(bar))
        results = []
        for name in sorted(measures, key=_order):
            bar.set_description(name)
            results.append(_one(study, name))
            bar.update()
    return Report(tuple(sorted(results, key=lambda m: measures.index(m.name))))


def names() -> list[str]:
    """The measures that can be asked for.

    >>> "top_eigenvalue" in names()
    True
    """
    return sorted(REGISTRY)


def _count_in(bar: Any) -> None:
    """One more product, shown beside the measure's name."""
    bar.products = getattr(bar, "products", 0) + 1
    bar.set_postfix_str(f"{bar.products} products", refresh=False)
    bar.update(0)


def _order(name: str) -> int:
    """The longer answer first: the top eigenvalue is then part of the top-k."""
    return 1 if name == "top_eigenvalue" else 0


def _one(study: Study, name: str) -> Measure:
    kept = study.journal.get(f"measure-{name}")
    if kept is not None:
        return Measure(**kept)
    start = time.perf_counter()
    with under(None, study.problem.device):
        outcome = REGISTRY[name](study)
    seconds = time.perf_counter() - start
    conditions = study.conditions() | {"under_rescaling": RESCALING[name]} | dict(outcome.conditions or {})
    result = Measure(name, outcome.value, outcome.error, outcome.products, seconds, conditions)
    study.journal.put(f"measure-{name}", vars(result))
    return result


def _key(problem: Problem, settings: Settings, seed: int) -> dict[str, Any]:
    """What makes two measurements the same one."""
    weights = problem.weights().double()
    mark = [float(weights.sum()), float(weights.norm()), float((weights * torch.arange(len(weights))).sum())]
    return {
        "weights": mark, "data": problem.data_hash, "settings": vars(settings), "seed": seed,
        "bn": problem.bn, "names": problem.names, "precision": f"torch.{problem.arithmetic}",
        # Of another criterion, architecture or buffers; rounded, as another number of threads sums in another order.
        "loss": f"{problem.initial_loss:.3g}", "slope": f"{float(problem.gradient.norm()):.3g}",
    }  # fmt: skip
