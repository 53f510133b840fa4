"""PyHessian, curvlinops and hessian-eigenthings on the sharpness benchmark's tasks: products counted, time limited.

The last two are not dependencies of the project: install them for the benchmark with ``pip install --no-deps --target
FOLDER`` and pass the folder as ``--peers``; without it they are skipped.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.sharpness_subjects import Subject, Truth
from conadv_lab.sharpness.report.crosscheck import pyhessian

TOP, EIGEN_ERROR, TRACE_ERROR = 5, 1e-3, 0.01


class OutOfTime(Exception):
    """A peer's task hit its time limit."""


class Meter:
    """Counts products, and ends the task at the first product after ``limit`` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit, self.products, self.start = limit, 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def through(self, product: Callable[..., Any]) -> Callable[..., Any]:
        """The same product, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.seconds > self.limit:
                raise OutOfTime
            self.products += 1
            return product(*args, **kwargs)

        return counted


@dataclass(frozen=True)
class Answer:
    """The outcome of a task.

    Attributes:
        seconds, products: its cost, up to the stop if it was stopped.
        error: the true error reached; ``None`` if it was stopped.
        told: remarks that the numbers do not show.
    """

    seconds: float
    products: int
    error: float | None
    told: str = ""

    def __str__(self) -> str:
        how = "stopped" if self.error is None else f"true error {self.error:.2g}"
        return f"{self.seconds:.3g} s, {self.products} products, {how}{self.told and '; ' + self.told}"


def bounded(limit: float, task: Callable[[Meter], float], told: str = "") -> Answer:
    """Run a task that returns its error, for at most about ``limit`` seconds."""
    meter = Meter(limit)
    try:
        error = task(meter)
    except OutOfTime:
        return Answer(meter.seconds, meter.products, None, f"not done within {limit:.0f} s")
    return Answer(meter.seconds, meter.products, error, told)


def eigen_error(values: Any, truth: Truth) -> float:
    """The largest relative error of the five eigenvalues."""
    found = np.sort(np.asarray(values, dtype=float))[::-1][:TOP]
    return float((np.abs(found - truth.top) / truth.top).max())


def loosest(attempts: list[Callable[[], Answer]], wanted: float) -> Answer:
    """The first attempt that reaches the error or is stopped; earlier attempts do not count."""
    for attempt in attempts:
        answer = attempt()
        if answer.error is None or answer.error <= wanted:
            return answer
    return answer


@contextmanager
def repaired_eig() -> Iterator[None]:
    """The removed ``torch.eig``, for symmetric matrices, in its old output layout."""

    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    with patch.object(torch, "eig", eig, create=True):
        yield


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Route PyHessian's products through the meter."""
    module = import_module("pyhessian.hessian")  # the package's name for it is taken by its class
    with patch.object(module, "hessian_vector_product", meter.through(module.hessian_vector_product)):
        yield


def pyhessian_top(subject: Subject, truth: Truth, seed: int, limit: float) -> Answer:
    """PyHessian's power iteration, at the loosest tolerance that reaches the error."""

    def attempt(tol: float) -> Answer:
        with pyhessian(subject.problem(), seed) as theirs:

            def task(meter: Meter) -> float:
                with metered(meter):
                    return eigen_error(theirs.eigenvalues(1000, tol, TOP)[0], truth)

            return bounded(limit, task, f"tolerance {tol:.0e}")

    return loosest([partial(attempt, tol) for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)], EIGEN_ERROR)


def pyhessian_trace(subject: Subject, truth: Truth, seed: int, limit: float, pilot: int = 16) -> Answer:
    """PyHessian's Hutchinson estimator, with enough samples for a 95 % interval of ± 1 %.

    Their number follows from the spread of a pilot. If they do not fit the time limit, the time is extrapolated from
    the pilot's samples, and ``told`` says so.
    """
    with pyhessian(subject.problem(), seed) as theirs:
        theirs.trace(1, 0)
        start = time.perf_counter()
        forms = np.array(theirs.trace(pilot, 0))
        each = (time.perf_counter() - start) / pilot
        needed = int(np.ceil((1.96 * forms.std(ddof=1) / (TRACE_ERROR * truth.trace)) ** 2))
        if needed * each > limit:
            told = f"{each:.3g} s a sample measured, times the {needed} needed by the spread of {pilot}"
            return Answer(needed * each, needed, TRACE_ERROR, told)
        seconds, forms = -time.perf_counter(), np.array(theirs.trace(needed, 0))
        return Answer(seconds + time.perf_counter(), needed, abs(float(forms.mean()) / truth.trace - 1))


def pyhessian_density(subject: Subject, steps: int, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(seconds, nodes, weights) of PyHessian's density from one start, with the repaired call."""
    with pyhessian(subject.problem(), seed) as theirs, repaired_eig():
        start = time.perf_counter()
        nodes, weights = theirs.density(iter=steps, n_v=1)
        return time.perf_counter() - start, np.array(nodes[0]), np.abs(np.array(weights[0]))


def curvlinops_operator(subject: Subject) -> Any:
    """Its Hessian; raises ``ImportError`` where it is not installed."""
    from curvlinops import HessianLinearOperator  # type: ignore[import-not-found]

    params = [p for p in subject.model.parameters() if p.requires_grad]
    return HessianLinearOperator(subject.model.eval(), nn.CrossEntropyLoss(), params, [subject.batch])


def eigenthings_operator(subject: Subject) -> Any:
    """Its Hessian; raises ``ImportError`` where it is not installed."""
    from hessian_eigenthings import HessianOperator  # type: ignore[import-not-found]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    return HessianOperator(subject.model.eval(), [subject.batch], loss)


class _Counted:
    """Another library's operator, with its products routed through a meter."""

    def __init__(self, operator: Any, product: Callable[[Tensor], Tensor], meter: Meter) -> None:
        self.__dict__.update(operator=operator, product=meter.through(product))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)

    def __matmul__(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return self.product(x)
        return torch.stack([self.product(column) for column in x.T], 1)

    matvec = __matmul__


def curvlinops_top(subject: Subject, truth: Truth, seed: int, limit: float) -> Answer:
    """SciPy's eigsh on curvlinops' operator, as in its documentation, at the loosest sufficient tolerance."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    inner = curvlinops_operator(subject)
    start = np.random.default_rng(seed).normal(size=inner.shape[0]).astype(np.float32)

    def attempt(tol: float) -> Answer:
        def task(meter: Meter) -> float:
            product = meter.through(lambda v: (inner @ torch.from_numpy(v.reshape(-1))).cpu().numpy())
            scipy = LinearOperator(inner.shape, matvec=product, dtype=np.float32)
            return eigen_error(eigsh(scipy, TOP, which="LA", v0=start, tol=tol)[0], truth)

        return bounded(limit, task, f"eigsh, tolerance {tol:.0e}")

    return loosest([partial(attempt, tol) for tol in (0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4)], EIGEN_ERROR)


def curvlinops_trace(subject: Subject, truth: Truth, seed: int, limit: float) -> Answer:
    """curvlinops' XTrace, with the fewest products (in steps) that give a 95 % interval of ± 1 % over five draws."""
    from curvlinops import xtrace

    inner = curvlinops_operator(subject)

    def once(products: int) -> Callable[[Meter], float]:
        def task(meter: Meter) -> float:
            counted = _Counted(inner, lambda v: inner @ v, meter)
            return float(xtrace(counted, products)) / truth.trace - 1  # type: ignore[no-any-return]

        return task

    return _fewest(once, (60, 100, 140, 200, 300, 500), limit, "XTrace", seed)


def eigenthings_top(subject: Subject, truth: Truth, seed: int, limit: float) -> Answer:
    """hessian-eigenthings' Lanczos, with the fewest steps (multiples of five) that reach the error."""
    from hessian_eigenthings import lanczos

    inner = eigenthings_operator(subject)

    def attempt(steps: int) -> Answer:
        def task(meter: Meter) -> float:
            counted = _Counted(inner, inner.matvec, meter)
            found = lanczos(counted, k=TOP, max_iter=steps, which="LA", reorthogonalize=True, seed=seed)
            return eigen_error(found.eigenvalues.cpu().numpy(), truth)

        return bounded(limit, task, f"{steps} steps")

    return loosest([partial(attempt, n) for n in range(15, 81, 5)], EIGEN_ERROR)


def eigenthings_trace(subject: Subject, truth: Truth, seed: int, limit: float) -> Answer:
    """hessian-eigenthings' Hutch++, with products chosen as in `curvlinops_trace`."""
    from hessian_eigenthings import trace

    inner = eigenthings_operator(subject)
    draws = iter(range(seed * 1000, seed * 1000 + 1000))

    def once(products: int) -> Callable[[Meter], float]:
        def task(meter: Meter) -> float:
            counted = _Counted(inner, inner.matvec, meter)
            return trace(counted, num_matvecs=products, seed=next(draws)).estimate / truth.trace - 1

        return task

    return _fewest(once, (60, 99, 141, 201, 300, 501), limit, "Hutch++", seed)


def _fewest(
    once: Callable[[int], Callable[[Meter], float]], counts: tuple[int, ...], limit: float, what: str, seed: int
) -> Answer:  # fmt: skip
    torch.manual_seed(seed)
    for products in counts:
        answers = [bounded(limit, once(products), what)]
        if answers[0].error is None:
            return answers[0]
        answers += [bounded(limit, once(products), what) for _ in range(4)]
        spread = 1.96 * float(np.sqrt(np.mean([(a.error or 0.0) ** 2 for a in answers])))
        middle = sorted(answers, key=lambda a: a.seconds)[2]
        best = Answer(
            middle.seconds, middle.products, spread, f"{what}, the error a 95 % interval of five draws"
        )
        if spread <= TRACE_ERROR:
            return best
    return best
