"""One model under measurement: what its measures share, so that no product is computed twice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_type_hints

import torch
from torch import Tensor

from conadv_lab.mistakes import ABOVE_0, COUNT, COUNT_OR_0, SHARE, require, require_ranges, unknown
from conadv_lab.reading import require_kind
from conadv_lab.sharpness.operators.matrices import GGN, Hessian
from conadv_lab.sharpness.problem.problem import Criterion, Problem
from conadv_lab.sharpness.spectrum.density import Density, density
from conadv_lab.sharpness.spectrum.eigen import Eigenpairs, Lanczos, eigenpairs, normal_vector, orthonormal
from conadv_lab.sharpness.spectrum.exact import ExactTrace, exact_trace
from conadv_lab.sharpness.spectrum.journal import Journal
from conadv_lab.sharpness.spectrum.trace import Probes


@dataclass(frozen=True)
class Settings:
    """Settings of the measures.

    Attributes:
        k: number of eigenvalues at each end.
        tol: relative error allowed for an eigenvalue.
        check: look for missed eigenvalues from a second start.
        likelihood: of the Fisher matrix, ``"categorical"`` or ``"gaussian"``.
        memory_budget: bytes for retained graphs.
        accuracy: requested relative half-width of traces.
        confidence: of intervals and bands.
        max_samples: largest number of random vectors for a trace.
        deflate: number of Lanczos vectors whose span is projected out of a trace's samples.
        probes, steps: random starts of the density, and Lanczos products per start.
        damping: the z of the effective dimension.
        rhos: radii of the sharpness in plain weights.
        adaptive_rhos: radii of the adaptive worst case, in units of |w|, as a 2-norm over all weights.
        relative_rhos: standard deviations of the adaptive average case, relative to each weight.
        ascent_steps, restarts: gradients per start of a worst case, and number of random starts besides the
            one-step one.
        draws: number of pairs ±d of random perturbations for an average case.
        m: examples per group of m-sharpness and of the noise scale; ``None``: the batches as given.
        keskar_epsilons, subspace: sizes of Keskar's box, and dimensions of its random subspace.
        epsilon: of FGSM and PGD, in the unit of the images, which lie in [0, 1].
        pgd_steps: steps of PGD.
    """

    k: int = 5
    tol: float = 1e-3
    check: bool = True
    likelihood: str = "categorical"
    memory_budget: int = 2**30
    accuracy: float = 0.01
    confidence: float = 0.95
    max_samples: int = 1000
    deflate: int = 40
    probes: int = 4
    steps: int = 24
    damping: float = 1.0
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2)
    adaptive_rhos: tuple[float, ...] = (0.5, 1.0, 2.0)
    relative_rhos: tuple[float, ...] = (0.05, 0.1)
    ascent_steps: int = 10
    restarts: int = 1
    draws: int = 8
    m: int | None = None
    keskar_epsilons: tuple[float, ...] = (1e-3, 5e-4)
    subspace: int = 100
    epsilon: float = 1 / 255
    pgd_steps: int = 10

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            require_kind(name, getattr(self, name), kind)
        require(0 < self.confidence < 1, "confidence", self.confidence, "above 0 and below 1")
        require_ranges(
            self, accuracy=ABOVE_0, max_samples=COUNT, deflate=COUNT_OR_0, probes=COUNT, steps=COUNT, damping=ABOVE_0,
            ascent_steps=COUNT, restarts=COUNT_OR_0, m=COUNT, subspace=COUNT, epsilon=SHARE, pgd_steps=COUNT,
        )  # fmt: skip
        for name in ("rhos", "adaptive_rhos", "relative_rhos", "keskar_epsilons"):
            sizes = getattr(self, name)
            fine = sizes and all(ABOVE_0[0](size) for size in sizes)
            require(fine, name, sizes, "at least one number, each above 0")

    @classmethod
    def of(cls, **given: Any) -> "Settings":
        """Settings from keywords; the error for an unknown one suggests the nearest name."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise unknown("setting", name, known)
        return cls(**given)


@dataclass(frozen=True)
class Outcome:
    """What a measure's function returns; see :class:`~conadv_lab.sharpness.measures.results.Measure`."""

    value: Any
    error: Any = None
    products: int = 0
    conditions: Mapping[str, Any] | None = None


class NormalisedLogits:
    """A criterion on f/s, where s² is the variance of an example's logits over classes.

    Andriushchenko et al. (2023), sec. 3. It removes the effect of the last layer's scale, which changes sharpness but
    no prediction.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def __call__(self, output: Tensor, targets: Any) -> Tensor:
        centred = output - output.mean(1, keepdim=True)
        return self.criterion(
            output / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12), targets
        )


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
        """The Hessian's Lanczos run, shared by eigenvalues, trace and density."""
        run = Lanczos(self.hessian, normal_vector(self.hessian, self.seed, 0))
        state = self.journal.get("lanczos")
        if state is not None:
            run.restore(state)
        return run

    def eigen(self, k: int, end: str = "top") -> Eigenpairs:
        """The outermost eigenpairs of the Hessian; the longest result so far serves shorter requests."""
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
    def probes(self) -> Probes:
        """Random quadratic forms of the Hessian, shared by trace and Frobenius norm."""
        run = self.lanczos
        while run.products < min(self.settings.deflate, run.room):
            run.step()
            self._note_step(run)
        probes = Probes(self.hessian, run.basis[: self.deflated].clone(), self.seed, self._note_probe)
        kept = self.journal.get("probes")
        if kept is not None:
            probes.forms, probes.squares = kept["forms"], kept["squares"]
        return probes

    @property
    def symmetry_seen(self) -> bool:
        """Whether symmetry of the Hessian's products was already checked."""
        return "hessian" in vars(self) and self.hessian.symmetry.pairs > 0

    @property
    def deflated(self) -> int:
        """How many Lanczos vectors are projected out of the probes."""
        return min(self.settings.deflate, self.problem.size)

    @cached_property
    def exact_ggn(self) -> ExactTrace:
        # If the Hessian's trace is exact, the graph proves that both are equal.
        if "exact_hessian" in vars(self) and self.exact_hessian.value is not None:
            return self.exact_hessian
        return exact_trace(self.problem, matrix="ggn")

    @cached_property
    def exact_hessian(self) -> ExactTrace:
        return exact_trace(self.problem, matrix="hessian")

    @cached_property
    def spectrum(self) -> Density:
        """The Hessian's density, with exact outliers."""
        s = self.settings
        top = self.eigen(s.k)
        return density(
            self.hessian, known=(top.values, orthonormal(top.vectors)), probes=s.probes, steps=s.steps,
            confidence=s.confidence, seed=self.seed, journal=self.journal,
        )  # fmt: skip

    @cached_property
    def _eigen(self) -> dict[str, Eigenpairs]:
        return {}

    def _note_step(self, run: Lanczos) -> None:
        if self.on_product:
            self.on_product()
        if self.journal.due:
            self.journal.put("lanczos", run.state())

    @cached_property
    def normalised(self) -> "Study":
        """The same study of the loss on normalised logits."""
        problem = self.problem.with_criterion(NormalisedLogits(self.problem.criterion))
        return Study(problem, self.settings, self.seed, self.facts, Journal(None), self.on_product)

    def _note_probe(self) -> None:
        if self.on_product:
            self.on_product()
        if self.journal.due:
            self.journal.put("probes", {"forms": self.probes.forms, "squares": self.probes.squares})

    def conditions(self) -> dict[str, Any]:
        """What every number of this study depends on.

        What cannot be inferred comes from ``facts`` and is ``None`` until stated there.
        """
        problem, criterion = self.problem, self.problem.criterion
        sizes = problem.batch_sizes
        common: dict[str, Any] = {
            "split": None,
            "augmentation": None,
            "learning_rate": None,
            "weight_decay_inside": None,
            "examples": problem.examples,
            "data_hash": problem.data_hash,
            "batch_size": max(sizes),
            "batches": len(sizes),
            "bn": problem.bn if _has_batch_norm(problem.model) else "none",
            "loss": type(criterion).__name__ if isinstance(criterion, torch.nn.Module) else _name(criterion),
            "reduction": "mean",
            "divided_by": problem.counted,
            "label_smoothing": label_smoothing(criterion),
            "parameters": _subset(problem),
            "left_out": list(problem.left_out),
            "precision": problem.arithmetic,
            "seed": self.seed,
            "loss_value": problem.initial_loss,
            "gradient_norm": float(problem.gradient.norm()),
            "weight_norm": float(problem.weights().norm()),
        }
        return common | dict(self.facts)


def _has_batch_norm(model: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


def label_smoothing(criterion: Any) -> float | str | None:
    """The loss's label smoothing; ``"none"`` for torch's other losses, ``None`` for custom ones.

    >>> label_smoothing(torch.nn.CrossEntropyLoss(label_smoothing=0.1)), label_smoothing(torch.nn.MSELoss())
    (0.1, 'none')
    """
    if criterion is torch.nn.functional.cross_entropy:
        return 0.0
    module = criterion if hasattr(criterion, "__name__") else type(criterion)
    known = "none" if module.__module__.startswith("torch.nn.") else None
    return getattr(criterion, "label_smoothing", known)


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _subset(problem: Problem) -> dict[str, Any]:
    total = sum(1 for _ in problem.model.named_parameters())
    whole = len(problem.names) + len(problem.left_out) == total
    return {"names": "all" if whole else list(problem.names), "numbers": problem.size}


MeasureFunction = Callable[[Study], Outcome]
REGISTRY: dict[str, MeasureFunction] = {}
RESCALING: dict[str, str] = {}
MOVES, UNCHANGED = "moves", "unchanged"


def register(name: str, rescaling: str = MOVES) -> Callable[[MeasureFunction], MeasureFunction]:
    """Make a function of a study available as ``measure(..., measures=(name,))``.

    ``rescaling`` says how a layer-wise rescaling that keeps a ReLU network's function affects the number.
    """

    def keep(function: MeasureFunction) -> MeasureFunction:
        require(name not in REGISTRY, "measure", name, "a name that is not in use")
        REGISTRY[name], RESCALING[name] = function, rescaling
        return function

    return keep
