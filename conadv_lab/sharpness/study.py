"""One model under measurement: what its measures share, so that no product is made twice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.eigen import Eigenpairs, Lanczos, eigenpairs, normal_vector
from conadv_lab.sharpness.journal import Journal
from conadv_lab.sharpness.operators import GGN, Hessian
from conadv_lab.sharpness.problem import Problem


@dataclass(frozen=True)
class Settings:
    """What the measures can be told.

    Attributes:
        k: how many eigenvalues at each end.
        tol: error allowed for an eigenvalue, relative to it.
        check: look for missed eigenvalues from a second start.
        likelihood: of the Fisher matrix, ``"categorical"`` or ``"gaussian"``.
        memory_budget: bytes for kept graphs.
    """

    k: int = 5
    tol: float = 1e-3
    check: bool = True
    likelihood: str = "categorical"
    memory_budget: int = 2**30

    @classmethod
    def of(cls, **given: Any) -> "Settings":
        """Settings from keywords; an unknown one is told with the nearest right name."""
        allowed = [f.name for f in fields(cls)]
        for name in given:
            if name not in allowed:
                raise unknown("setting", name, allowed)
        return cls(**given)


@dataclass(frozen=True)
class Outcome:
    """What a measure's function returns; see :class:`~conadv_lab.sharpness.results.Measure`."""

    value: Any
    error: Any = None
    products: int = 0
    conditions: Mapping[str, Any] | None = None


class Study:
    """A problem with its settings, and the operators and Lanczos runs that several measures use."""

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        seed: int,
        facts: Mapping[str, Any],
        journal: Journal,
        on_product: Callable[[], None] | None = None,
    ) -> None:
        self.problem, self.settings, self.seed = problem, settings, seed
        self.facts, self.journal, self.on_product = facts, journal, on_product

    @cached_property
    def hessian(self) -> Hessian:
        return Hessian(self.problem, memory_budget=self.settings.memory_budget)

    @cached_property
    def ggn(self) -> GGN:
        return GGN(self.problem, memory_budget=self.settings.memory_budget)

    @cached_property
    def lanczos(self) -> Lanczos:
        """The Hessian's run, which eigenvalues, trace and density share."""
        run = Lanczos(self.hessian, normal_vector(self.hessian, self.seed, 0))
        state = self.journal.get("lanczos")
        if state is not None:
            run.restore(state)
        return run

    def eigen(self, k: int, end: str = "top") -> Eigenpairs:
        """The outermost eigenpairs of the Hessian; the longest answer so far serves the shorter ones."""
        k = min(k, self.problem.size)
        known: Eigenpairs | None = self._eigen.get(end)
        if known is None or len(known.values) < k:
            known = eigenpairs(
                self.hessian, k, end=end, tol=self.settings.tol, check=self.settings.check, seed=self.seed,
                run=self.lanczos, on_step=self._note_step,
            )  # fmt: skip
            self._eigen[end] = known
        return known

    @cached_property
    def _eigen(self) -> dict[str, Eigenpairs]:
        return {}

    def _note_step(self, run: Lanczos) -> None:
        if self.on_product:
            self.on_product()
        if self.journal.due:
            self.journal.put("lanczos", run.state())

    def conditions(self) -> dict[str, Any]:
        """What every number of this study depends on; what the caller alone knows comes from ``facts``."""
        problem, criterion = self.problem, self.problem.criterion
        sizes = problem.batch_sizes
        common: dict[str, Any] = {
            "split": "not stated",
            "augmentation": "not stated",
            "learning_rate": "not stated",
            "weight_decay_inside": "not stated",
            "examples": problem.examples,
            "data_hash": problem.data_hash,
            "batch_size": max(sizes),
            "batches": len(sizes),
            "bn": problem.bn if _has_batch_norm(problem.model) else "none",
            "loss": type(criterion).__name__ if isinstance(criterion, torch.nn.Module) else _name(criterion),
            "reduction": "mean",
            "label_smoothing": getattr(criterion, "label_smoothing", "not stated"),
            "parameters": _subset(problem),
            "left_out": list(problem.left_out),
            "precision": str(problem.precision).removeprefix("torch."),
            "seed": self.seed,
            "loss_value": problem.initial_loss,
            "gradient_norm": float(problem.gradient.norm()),
            "weight_norm": float(problem.weights().norm()),
        }
        return common | dict(self.facts)


def _has_batch_norm(model: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _subset(problem: Problem) -> dict[str, Any]:
    total = sum(1 for _ in problem.model.named_parameters())
    whole = len(problem.names) + len(problem.left_out) == total
    return {"names": "all" if whole else list(problem.names), "numbers": problem.size}


MeasureFunction = Callable[[Study], Outcome]
REGISTRY: dict[str, MeasureFunction] = {}


def register(name: str) -> Callable[[MeasureFunction], MeasureFunction]:
    """Make a function of a study available as ``measure(..., measures=(name,))``."""

    def keep(function: MeasureFunction) -> MeasureFunction:
        require(name not in REGISTRY, "measure", name, "a name that is not taken")
        REGISTRY[name] = function
        return function

    return keep
